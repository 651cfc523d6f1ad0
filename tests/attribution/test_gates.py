"""Token contributions add up to the gradient's product with the direction, for every kind of layer."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from gradsketch.attribution.gates import token_products
from gradsketch.errors import InputError
from gradsketch.gradients.tasks import CausalLM, Classification, Seq2SeqLM, Task

transformers = pytest.importorskip("transformers")
SMALL = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
IDS = torch.tensor([[3, 7, 7, 1, 49, 12, 0, 5]])


def llama():
    config = transformers.LlamaConfig(**SMALL, num_key_value_heads=2, tie_word_embeddings=True)
    return transformers.LlamaForCausalLM(config), CausalLM(), {"input_ids": IDS}


def gpt2():
    config = transformers.GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4, n_positions=16)
    config.bos_token_id = config.eos_token_id = 0
    return transformers.GPT2LMHeadModel(config), CausalLM(), {"input_ids": IDS}


def mixtral():
    config = transformers.MixtralConfig(**SMALL, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2)
    return transformers.MixtralForCausalLM(config), CausalLM(), {"input_ids": IDS}


def bert():
    model = transformers.BertForSequenceClassification(transformers.BertConfig(**SMALL))
    return model, Classification(), {"input_ids": IDS, "labels": torch.tensor([1])}


def albert():
    """One layer, used twice."""
    config = transformers.AlbertConfig(**SMALL, embedding_size=16)
    return transformers.AlbertForSequenceClassification(config), Classification(), bert()[2]


def t5():
    """Source and target of equal length, so that shapes do not tell encoder from decoder."""
    config = transformers.T5Config(vocab_size=50, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4)
    config.decoder_start_token_id = 0
    return transformers.T5ForConditionalGeneration(config), Seq2SeqLM(), {"input_ids": IDS, "labels": IDS.flip(1)}


MODELS = (llama, gpt2, bert, albert, t5)


def case(make):
    torch.manual_seed(0)
    model, task, batch = make()
    model = model.double().eval()
    direction = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    return model, task, batch, direction


def product(model, task, batch, direction):
    names, tensors = zip(*model.named_parameters(), strict=True)
    parts = torch.autograd.grad(task.losses(model, batch).sum(), tensors, allow_unused=True)
    return float(sum((g * direction[n]).sum() for n, g in zip(names, parts, strict=True) if g is not None))


@pytest.mark.parametrize("make", MODELS)
def test_contributions_add_up(make):
    model, task, batch, direction = case(make)
    tokens, rest = token_products(model, task, batch, direction)
    assert len(tokens) == batch["input_ids"].shape[1] + (batch["labels"].shape[1] if make is t5 else 0)
    assert float(tokens.double().sum()) + rest == pytest.approx(product(model, task, batch, direction), rel=1e-5)


def test_layers_that_cannot_be_split_are_left_out():
    """Routers return tuples and grouped experts have no forward derivative."""
    torch.manual_seed(0)
    model, task, batch = mixtral()
    direction = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    tokens, rest = token_products(model, task, batch, direction)
    rest_of_model = {n: v * ("mlp" not in n) for n, v in direction.items()}
    assert float(tokens.sum()) + rest == pytest.approx(product(model, task, batch, rest_of_model), rel=1e-4)


@pytest.mark.parametrize("make", [llama, gpt2, t5])
def test_language_models_leave_nothing_over(make):
    model, task, batch, direction = case(make)
    if make is t5:  # relative position biases belong to pairs of positions
        direction = {name: v for name, v in direction.items() if "relative_attention_bias" not in name}
    assert token_products(model, task, batch, direction)[1] == 0


def test_a_token_carries_its_own_embedding_row():
    """Moving one row of an embedding changes nothing but what the tokens with that id add."""
    model, task, batch, _ = case(gpt2)
    v = torch.zeros_like(model.transformer.wte.weight)
    v[7] = torch.randn(v.shape[1])  # not all ones: normalisation makes the gradient add up to zero over a token's row
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.clone())  # untie
    tokens, rest = token_products(model, task, batch, {"transformer.wte.weight": v})
    assert tokens.nonzero().flatten().tolist() == [1, 2]
    assert rest == 0


def test_a_linear_layer_by_hand():
    """error_tᵀ V input_t, computed from the definition."""
    torch.manual_seed(0)
    table, layer = torch.randn(50, 6, dtype=torch.float64), nn.Linear(6, 4).double()

    class Sum(Task):
        def losses(self, model, batch):
            return model(table[batch["input_ids"]]).tanh().square().sum((-1, -2))

    v = {"weight": torch.randn(4, 6).double(), "bias": torch.randn(4).double()}
    tokens, rest = token_products(layer, Sum(), {"input_ids": IDS}, v)
    x = table[IDS[0]]
    y = (x @ layer.weight.T + layer.bias).tanh()
    errors = 2 * y * (1 - y.square())
    expected = (errors * (x @ v["weight"].T + v["bias"])).sum(-1)
    torch.testing.assert_close(tokens.double(), expected, rtol=1e-6, atol=1e-6)
    assert rest == 0


def test_layers_may_run_on_other_threads():
    """As checkpointed layers do in a backward pass on a GPU."""
    layer = nn.Linear(6, 4)
    v = {name: torch.randn_like(p) for name, p in layer.named_parameters()}

    class OnAThread(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer
            self.register_buffer("kept", torch.ones(()))

        def forward(self, x):
            return ThreadPoolExecutor(1).submit(self.layer, x).result(timeout=20)

    class Sum(Task):
        def losses(self, model, batch):
            x = torch.linspace(0, 1, 48).view(8, 6)
            return model(x[None]).tanh().square().sum((-1, -2))

    there, _ = token_products(OnAThread(), Sum(), {"input_ids": IDS}, {f"layer.{name}": t for name, t in v.items()})
    here, _ = token_products(layer, Sum(), {"input_ids": IDS}, v)
    assert torch.equal(there, here)


class Failing(Task):
    def losses(self, model, batch):
        model(batch["input_ids"])
        raise KeyboardInterrupt


@pytest.mark.parametrize("task", [CausalLM(), Failing()])
def test_the_model_is_left_as_found(task):
    model, _, batch, direction = case(gpt2)
    model.train()
    model.transformer.h[0].eval()
    before = copy.deepcopy(model.state_dict())
    modes = [m.training for m in model.modules()]
    try:
        token_products(model, task, batch, direction)
    except KeyboardInterrupt:
        assert isinstance(task, Failing)
    assert [m.training for m in model.modules()] == modes
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())


def test_only_one_example_of_tokens():
    model, task, _, direction = case(gpt2)
    for batch in ({"input_ids": IDS.repeat(2, 1)}, {"pixels": IDS}, (IDS,)):
        with pytest.raises(InputError, match="one example"):
            token_products(model, task, batch, direction)
