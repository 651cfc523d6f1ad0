"""Small models in float64 with a loss and data, and derivatives of their mean loss by a route of their own."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import default_collate


@dataclass
class Case:
    model: nn.Module
    losses: Callable[[nn.Module, Any], Tensor]
    examples: list[Any]
    kind: str = "cross-entropy"

    @property
    def batch(self) -> Any:
        """All examples at once; ``examples`` with batch_size=3 gives batches of unequal length instead."""
        batch = default_collate(self.examples)
        return tuple(batch) if isinstance(batch, list) else batch


def token_losses(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    # The built-in loss of transformers computes in float32 whatever the model's dtype.
    logits = model(input_ids=batch["input_ids"]).logits[:, :-1]
    return nn.functional.cross_entropy(logits.transpose(1, 2), batch["input_ids"][:, 1:], reduction="none").mean(1)


def class_losses(model: nn.Module, batch: list[Tensor]) -> Tensor:
    output = model(batch[0])
    return nn.functional.cross_entropy(getattr(output, "logits", output), batch[1], reduction="none")


def square_losses(model: nn.Module, batch: list[Tensor]) -> Tensor:
    return (model(batch[0]) - batch[1]).square().sum(1)


def mlp() -> Case:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    return Case(model.double(), class_losses, [(torch.randn(4).double(), torch.tensor(i % 3)) for i in range(8)])


def regression() -> Case:
    torch.manual_seed(1)
    examples = [(torch.randn(3).double(), torch.randn(2).double()) for _ in range(7)]
    return Case(nn.Linear(3, 2).double(), square_losses, examples, "squares")


def layer_norm_mlp() -> Case:
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.GELU(), nn.Linear(6, 5), nn.LayerNorm(5))
    for p in model.parameters():
        p.data += 0.3 * torch.randn_like(p)
    return Case(model.double(), class_losses, [(torch.randn(4).double(), torch.tensor(i % 5)) for i in range(8)])


def conv_batch_norm() -> Case:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Softplus(), nn.Flatten(), nn.Linear(12, 3)).double()
    model(torch.randn(16, 1, 4, 4).double())  # running statistics that are not 0 and 1
    examples = [(torch.randn(1, 4, 4).double(), torch.tensor(i % 3)) for i in range(8)]
    return Case(model.eval(), class_losses, examples)


def gpt2(attention: str = "eager") -> Case:
    """LayerNorm, tied embeddings, dropout layers in eval mode."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(4)
    config = GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=11, n_positions=6, attn_implementation=attention)
    return Case(_spread(GPT2LMHeadModel(config)), token_losses, _sentences())


def llama() -> Case:
    """RMSNorm, grouped-query attention, rotary embeddings, tied embeddings.

    Its own RMSNorm and eager attention compute in float32 whatever the dtype, so they are replaced here.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(5)
    config = LlamaConfig(
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=11,
        max_position_embeddings=8,
        tie_word_embeddings=True,
        attn_implementation="sdpa",
    )
    model = LlamaForCausalLM(config)
    for block in model.model.layers:
        block.input_layernorm, block.post_attention_layernorm = nn.RMSNorm(8), nn.RMSNorm(8)
    model.model.norm = nn.RMSNorm(8)
    return Case(_spread(model), token_losses, _sentences())


def bert() -> Case:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(6)
    config = BertConfig(
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=11,
        max_position_embeddings=8,
        num_labels=3,
        attn_implementation="eager",
    )
    examples = [(example["input_ids"], torch.tensor(i % 3)) for i, example in enumerate(_sentences())]
    return Case(_spread(BertForSequenceClassification(config)), class_losses, examples)


CASES = {f.__name__: f for f in (mlp, regression, layer_norm_mlp, conv_batch_norm, gpt2, llama, bert)}


def gradient_by_backward(case: Case, shift: Tensor | None = None) -> Tensor:
    """The gradient of the mean loss, by ``.backward()`` of the plain mean on a copy whose weights were moved."""
    model = copy.deepcopy(case.model) if shift is None else _moved(case, shift)
    case.losses(model, case.batch).mean().backward()
    return _gradient_of(model)


def hessian_times(case: Case, vector: Tensor) -> Tensor:
    """The product with the Hessian by a fourth-order difference of gradients: error about 1e-9 in float64."""
    h = 2e-3 / float(vector.norm())
    steps = ((8, h), (-8, -h), (-1, 2 * h), (1, -2 * h))
    return sum(weight * gradient_by_backward(case, step * vector) for weight, step in steps) / (12 * h)


def gauss_newton_times(case: Case, vector: Tensor) -> Tensor:
    """Jᵀ A J v / N: J v by differences of outputs, A in closed form, Jᵀ by plain backward."""
    h = 2e-3 / float(vector.norm())
    slope = torch.zeros(())
    for weight, step in ((8, h), (-8, -h), (-1, 2 * h), (1, -2 * h)):
        slope = slope + weight * _outputs(_moved(case, step * vector), case.batch).detach() / (12 * h)
    model = copy.deepcopy(case.model)
    outputs = _outputs(model, case.batch)
    if case.kind == "squares":
        curved = 2 * slope
    else:
        p = outputs.detach().softmax(-1)
        curved = p * slope - p * (p * slope).sum(-1, keepdim=True)
        if outputs.ndim == 3:  # each sequence's loss is the mean over the tokens that are predicted
            curved = curved[:, :-1] / (outputs.shape[1] - 1)
            outputs = outputs[:, :-1]
    (outputs * curved).sum().backward()
    return _gradient_of(model) / len(case.examples)


def fisher_times(case: Case, vector: Tensor) -> Tensor:
    """Σ_i g_i (g_i·v) / N, each g_i by a backward pass of its own."""
    total = torch.zeros_like(vector)
    for example in case.examples:
        gradient = gradient_by_backward(Case(case.model, case.losses, [example]))
        total += gradient * (gradient @ vector)
    return total / len(case.examples)


def _outputs(model: nn.Module, batch: Any) -> Tensor:
    output = model(input_ids=batch["input_ids"]) if isinstance(batch, dict) else model(batch[0])
    return getattr(output, "logits", output)


def _moved(case: Case, shift: Tensor) -> nn.Module:
    model = copy.deepcopy(case.model)
    with torch.no_grad():
        for p, s in zip(model.parameters(), shift.split([p.numel() for p in model.parameters()]), strict=True):
            p += s.view(p.shape)
    return model


def _gradient_of(model: nn.Module) -> Tensor:
    return torch.cat([torch.zeros_like(p).view(-1) if p.grad is None else p.grad.view(-1) for p in model.parameters()])


def vectors(case: Case, count: int = 3) -> Tensor:
    n = sum(p.numel() for p in case.model.parameters())
    return torch.randn(count, n, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


def worst_block_error(case: Case, came: Tensor, wanted: Tensor) -> float:
    """The largest relative error in the rows of one parameter tensor (rows that are zero count as the mean ones)."""
    sizes = [p.numel() for p in case.model.parameters()]
    pairs = zip(came.split(sizes, -1), wanted.split(sizes, -1), strict=True)
    least = 1e-3 * float(wanted.norm()) / len(sizes) ** 0.5
    return max(float((c - w).norm()) / max(float(w.norm()), least) for c, w in pairs)


def _spread(model: nn.Module) -> nn.Module:
    """Float64, eval mode, and weights away from their initial zeros and ones."""
    with torch.no_grad():
        for p in model.parameters():
            p += 0.2 * torch.randn_like(p)
    return model.double().eval()


def _sentences() -> list[dict[str, Tensor]]:
    # Tokens 0 to 2 are special: an embedding's padding row is frozen.
    return [{"input_ids": torch.randint(3, 11, (5,))} for _ in range(5)]
