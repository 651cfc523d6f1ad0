"""A metric depends on the model and the data alone: not on batches, on padding, or on labels that do not count."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gradsketch as gs

transformers = pytest.importorskip("transformers")

V = 29
BOS, UNK, PAD = 0, 1, 2
LIMIT = 24
IDS = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": BOS}
LEARNED = {
    **IDS,
    "vocab_size": V,
    "d_model": 16,
    **{f"{side}_layers": 1 for side in ("encoder", "decoder")},
    **{f"{side}_attention_heads": 2 for side in ("encoder", "decoder")},
    **{f"{side}_ffn_dim": 16 for side in ("encoder", "decoder")},
    "max_position_embeddings": LIMIT,
    "decoder_start_token_id": PAD,
    "forced_eos_token_id": None,
}
ONE_LAYER = {**IDS, "vocab_size": V, "hidden_size": 16, "num_hidden_layers": 1}
FAMILIES: dict[str, tuple[str, str, dict[str, object]]] = {
    "Bart": ("BartForConditionalGeneration", "BartConfig", LEARNED),
    "Marian": ("MarianMTModel", "MarianConfig", LEARNED),
    "Pegasus": ("PegasusForConditionalGeneration", "PegasusConfig", LEARNED),
    "T5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {**IDS, "vocab_size": V, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
        | {"decoder_start_token_id": PAD},
    ),
    "GPT-2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {**IDS, "vocab_size": V, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": LIMIT},
    ),
    "OPT": (
        "OPTForCausalLM",
        "OPTConfig",
        {**ONE_LAYER, "ffn_dim": 16, "num_attention_heads": 2, "max_position_embeddings": LIMIT}
        | {"word_embed_proj_dim": 16},
    ),
    "Llama": ("LlamaForCausalLM", "LlamaConfig", {**ONE_LAYER, "intermediate_size": 16, "num_attention_heads": 2}),
    "Bloom": (
        "BloomForCausalLM",
        "BloomConfig",
        {**IDS, "vocab_size": V, "hidden_size": 16, "n_layer": 1, "n_head": 2},
    ),
    "Mamba": ("MambaForCausalLM", "MambaConfig", {**ONE_LAYER, "state_size": 4}),
}


def family(name: str) -> nn.Module:
    """Return a tiny model whose weights are large enough that its answers depend on its prompts."""
    model_class, config_class, options = FAMILIES[name]
    torch.manual_seed(0)
    model = getattr(transformers, model_class)(getattr(transformers, config_class)(**options)).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return model


class Letters:
    """One token a letter."""

    pad_token_id, eos_token_id = PAD, BOS

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) - 94 for letter in text]}

    def batch_decode(self, rows: list[list[int]], skip_special_tokens: bool) -> list[str]:
        return ["".join(chr(94 + i) for i in row if i > PAD) for row in rows]


def prompts(count: int = 12) -> list[str]:
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(2, 12, (count,), generator=generator).tolist()
    return ["".join(chr(97 + int(i)) for i in torch.randint(26, (n,), generator=generator)) for n in lengths]


def alone(model: nn.Module, prompt: str, most: int) -> str:
    """Return the model's own greedy answer to one prompt: no padding, nothing of ours."""
    ids = torch.tensor([Letters()(prompt)["input_ids"]])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=most, do_sample=False, pad_token_id=PAD
    )
    new = out if model.config.is_encoder_decoder else out[:, ids.shape[1] :]
    return Letters().batch_decode(new.tolist(), skip_special_tokens=True)[0]


@pytest.mark.parametrize("name", FAMILIES)
def test_answers_do_not_depend_on_the_size_of_batches(name: str) -> None:
    model, asked = family(name), prompts()
    wanted = [alone(model, prompt, 8) for prompt in asked]
    assert len(set(wanted)) > 4
    for size in (1, 2, 7, 12):
        metric = gs.ExactMatch(Letters(), list(zip(asked, wanted, strict=True)), max_new_tokens=8, batch_size=size)
        assert metric.answers(model, asked) == wanted
        assert metric(model) == 1.0


def test_a_model_that_does_not_know_padding_is_asked_without_it() -> None:
    class Counts(nn.Module):
        """Answers by the number of tokens it is given, padding or not."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

        def generate(self, input_ids: Tensor, **_: object) -> Tensor:
            length = input_ids.shape[1]
            return torch.cat([input_ids, torch.full((len(input_ids), 1), length + PAD)], dim=1)

    asked = prompts()
    for size in (1, 2, 7, 12):
        answers = gs.ExactMatch(Letters(), [("a", "b")], batch_size=size).answers(Counts(), asked)
        assert answers == [chr(96 + len(prompt)) for prompt in asked]


def test_an_answer_ends_at_its_end_also_where_padding_is_no_special_token() -> None:
    class Ends(nn.Module):
        """Answers a prompt with its first letter, ends, and pads up to the longest answer of the batch."""

        generation_config = type("Config", (), {"eos_token_id": [BOS]})()

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

        def generate(self, input_ids: Tensor, **_: object) -> Tensor:
            tail = torch.tensor([[BOS, 9, 9]]).expand(len(input_ids), -1)
            return torch.cat([input_ids, input_ids[:, -1:], tail], dim=1)

    assert gs.ExactMatch(Letters(), [("a", "b")]).answers(Ends(), ["xb", "abc"]) == ["b", "c"]


# --- positions ---


@pytest.mark.parametrize("name", ["GPT-2", "OPT", "Bart"])
@pytest.mark.parametrize("size", [1, 12])
def test_answers_end_where_positions_end(name: str, size: int) -> None:
    model, asked = family(name), [*prompts(4), "abcdefghijklmnopqrst"]
    metric = gs.ExactMatch(Letters(), [("a", "b")], max_new_tokens=100, batch_size=size)
    wanted = [alone(model, p, LIMIT if model.config.is_encoder_decoder else LIMIT - len(p) + 1) for p in asked]
    assert metric.answers(model, asked) == wanted


@pytest.mark.parametrize("name", ["GPT-2", "Bart"])
def test_a_prompt_beyond_the_positions_is_named(name: str) -> None:
    metric = gs.ExactMatch(Letters(), [("a" * 30, "b")], max_new_tokens=5)
    with pytest.raises(gs.InputError, match=r"a prompt of 30 tokens and max_new_tokens=5 for .* has 24 positions"):
        metric(family(name))


# --- labels and losses ---


class Says(nn.Module):
    """Whatever it is asked, these logits."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, x: Tensor) -> Tensor:
        return self.logits[: len(x)]


@pytest.mark.parametrize("metric", [gs.Accuracy, gs.Loss])
def test_a_model_in_training_mode_is_measured_in_evaluation_mode(metric: Callable[..., Any]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 10), nn.BatchNorm1d(10), nn.Dropout(0.5), nn.Linear(10, 2)).train()
    data = [(torch.randn(6), i % 2) for i in range(33)]  # the last batch of 32 is of one
    before = {name: value.clone() for name, value in model.state_dict().items()}
    values = [metric(gs.Classification(), data, batch_size=size)(model) for size in (1, 8, 32, 32)]
    assert values == pytest.approx([metric(gs.Classification(), data)(model.eval())] * 4)
    assert model.train().training
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_labels_that_do_not_count_are_not_counted_as_wrong() -> None:
    labels = torch.tensor([[0, 1, -100], [-100, 2, 2]])
    logits = torch.nn.functional.one_hot(labels.clamp(min=0), 3).float()
    accuracy = gs.Accuracy(gs.Classification(), (torch.zeros(2, 1), labels))
    assert accuracy(Says(logits)) == 1.0
    logits[1, 1] = torch.tensor([1.0, 0.0, 0.0])
    assert accuracy(Says(logits)) == 0.75
    with pytest.raises(gs.InputError, match="all −100"):
        gs.Accuracy(gs.Classification(), (torch.zeros(2, 1), labels * 0 - 100))(Says(logits))


def token_losses(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """One loss a token."""
    return nn.functional.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten(), reduction="none")


@pytest.mark.parametrize(
    "use",
    [
        lambda model, batch: gs.Loss(token_losses, batch)(model),
        lambda model, batch: gs.fine_tune(model, token_losses, batch, lambda _: 0.0, steps=1),
    ],
    ids=["metric", "training"],
)
def test_every_mean_counts_examples(use: Callable[[nn.Module, object], object]) -> None:
    model, batch = Says(torch.randn(2, 3, 4)), (torch.zeros(2, 1), torch.zeros(2, 3, dtype=torch.int64))
    with pytest.raises(gs.InputError, match=r"6 losses from .* for a batch of 2 examples"):
        use(model, batch)


@pytest.mark.parametrize("size", [1, 2, 7])
def test_loss_is_the_mean_over_examples_that_curvature_takes(size: int) -> None:
    torch.manual_seed(0)
    model = nn.Linear(5, 3).double()
    data = [(torch.randn(5, dtype=torch.float64), i % 3) for i in range(9)]
    task = gs.Classification()
    own = task.losses(model, task.collate(data)).mean()
    assert gs.Loss(task, data, batch_size=size)(model) == pytest.approx(own.item(), rel=1e-12)
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(own, list(model.parameters()))])
    taken = gs.loss_gradient(model, task, data, batch_size=size, dtype=torch.float64)
    torch.testing.assert_close(taken, gradient)


def test_the_accuracy_of_a_language_model_is_of_the_tokens_that_its_loss_is_of() -> None:
    """What predicts a token stands one place before it in a causal model, in its own place elsewhere."""
    torch.manual_seed(0)
    ids = torch.tensor([[3, 4, 5, 6, 7], [PAD, PAD, 5, 9, 8]])
    mask, labels = (ids != PAD).long(), ids.masked_fill(ids == PAD, -100)
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=16, n_positions=LIMIT, vocab_size=V, **IDS)
    causal = transformers.GPT2LMHeadModel(config).eval()
    ones = [causal(input_ids=row[m > 0][None]).logits[0, :-1].argmax(-1) for row, m in zip(ids, mask, strict=True)]
    wanted = torch.cat([one == row[m > 0][1:] for one, row, m in zip(ones, ids, mask, strict=True)]).double().mean()
    assert gs.Accuracy(gs.CausalLM(), batch)(causal) == pytest.approx(float(wanted))
    causal.lm_head.weight = nn.Parameter(torch.zeros(V, 16))
    causal.lm_head.bias = nn.Parameter(torch.eye(V)[8])  # says 8, whatever it is asked
    assert gs.Accuracy(gs.CausalLM(), batch)(causal) == pytest.approx(1 / 6)

    torch.manual_seed(0)
    pairs = {"input_ids": ids[:, :3], "labels": torch.tensor([[5, 6, 7], [8, 9, -100]])}
    bart = transformers.BartForConditionalGeneration(transformers.BartConfig(**LEARNED)).eval()
    said = bart(**pairs).logits.argmax(-1)
    assert gs.Accuracy(gs.Seq2SeqLM(), pairs)(bart) == pytest.approx(float((said == pairs["labels"]).sum() / 5))


@pytest.mark.parametrize(
    ("labels", "classes", "words"),
    [
        (torch.tensor([0, 1]), 1, "logits of 1 class"),
        (torch.tensor([0.5, 1.0]), 2, "labels of dtype torch.float32"),
        (torch.tensor([0, 7]), 2, "holds the label 7"),
    ],
)
def test_labels_that_are_no_classes_are_refused(labels: Tensor, classes: int, words: str) -> None:
    with pytest.raises(gs.InputError, match=words):
        gs.Accuracy(gs.Classification(), (torch.zeros(2, 1), labels))(nn.Linear(1, classes))


def test_each_seed_and_dimension_counts_once() -> None:
    data = (torch.zeros(4, 1), torch.tensor([0, 1, 0, 1]))
    model, task = nn.Linear(1, 2), gs.Classification()
    for seeds in ((0, 0), ()):
        with pytest.raises(gs.InputError, match="seeds="):
            gs.intrinsic_dimension(model, task, data, lambda _: 0.0, target=1, d_min=1, seeds=seeds)
        with pytest.raises(gs.InputError, match="seeds="):
            gs.dimension_curve(model, task, data, lambda _: 0.0, [1], steps=1, seeds=seeds)
    for dims in ([], [1, 1]):
        with pytest.raises(gs.InputError, match="different dimensions"):
            gs.dimension_curve(model, task, data, lambda _: 0.0, dims, steps=1)


def test_which_end_of_a_metric_is_better_is_true_or_false() -> None:
    def metric(model: nn.Module) -> float:
        return 1.0

    metric.lower_is_better = "no"  # type: ignore[attr-defined]
    model, data = nn.Linear(1, 2), (torch.zeros(1, 1), torch.zeros(1, dtype=torch.int64))
    with pytest.raises(gs.InputError, match="lower_is_better='no'"):
        gs.intrinsic_dimension(model, gs.Classification(), data, metric, target=2, d_min=1)


def test_a_logit_that_is_nan_is_no_most_likely_class():
    model, data = torch.nn.Linear(2, 2), [(torch.ones(2), 0), (-torch.ones(2), 1)]
    with torch.no_grad():
        model.weight.fill_(torch.nan)
    with pytest.raises(gs.NonFiniteError, match="logits that are NaN"):
        gs.Accuracy(gs.Classification(), data)(model)
