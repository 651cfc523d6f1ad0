"""Routes against dense eigh of real Hessians: closed-form regression, a classifier, tiny transformers."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import gradsketch as gs


def test_linear_regression_has_its_spectrum_in_closed_form():
    """The Hessian of the mean of (w·x − y)²/2 is XᵀX/N."""
    torch.manual_seed(0)
    inputs = torch.randn(64, 30, dtype=torch.float64) * torch.logspace(0, -2, 30, dtype=torch.float64)
    model = nn.Linear(30, 1, bias=False).double()

    def losses(model, batch):
        return (model(batch[0])[:, 0] - batch[1]).square() / 2

    operator = gs.hessian(model, losses, (inputs, torch.randn(64, dtype=torch.float64)))
    expected = torch.linalg.eigvalsh(inputs.T @ inputs / 64).flip(0)[:10].numpy()
    for method in ("full", "sketched-basis"):
        result = gs.spectrum(operator, 10, method=method, steps=100, tolerance=1e-6)
        np.testing.assert_allclose(result.values, expected, rtol=1e-6)
        assert result.r_neg == 0


def perceptron():
    model = nn.Sequential(nn.Linear(20, 16), nn.Tanh(), nn.Linear(16, 8))
    batch = (torch.randn(64, 20), torch.randint(0, 8, (64,)))
    return (
        model,
        batch,
        lambda model, batch: cross_entropy(model(batch[0].to(dtype_of(model))), batch[1], reduction="none"),
    )


def dtype_of(model):
    return next(model.parameters()).dtype


def language_model(kind):
    transformers = pytest.importorskip("transformers")
    common = {"vocab_size": 16, "attn_implementation": "eager"}
    if kind == "gpt2":
        config = transformers.GPT2Config(
            n_layer=1, n_head=2, n_embd=8, n_positions=8, bos_token_id=0, eos_token_id=0, **common
        )
        model = transformers.GPT2LMHeadModel(config)
    elif kind == "llama":
        config = transformers.LlamaConfig(
            hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
            bos_token_id=0, eos_token_id=0, tie_word_embeddings=True, **common,
        )  # fmt: skip
        model = transformers.LlamaForCausalLM(config)
    else:
        config = transformers.BertConfig(
            hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
            max_position_embeddings=8, **common,
        )  # fmt: skip
        model = transformers.BertForMaskedLM(config)
    tokens = torch.randint(1, 16, (8, 8))

    def losses(model, batch):
        logits = model(input_ids=batch["input_ids"]).logits
        shifted = (logits, batch["input_ids"]) if kind == "bert" else (logits[:, :-1], batch["input_ids"][:, 1:])
        return cross_entropy(shifted[0].flatten(0, 1), shifted[1].flatten(), reduction="none").view(8, -1).mean(1)

    return model.eval(), {"input_ids": tokens}, losses


def make(kind):
    torch.manual_seed(0)
    return perceptron() if kind == "perceptron" else language_model(kind)


def train(model, batch, losses):
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        losses(model, batch).mean().backward()
        optimizer.step()


_FAST = [("perceptron", False), ("gpt2", True)]
_SLOW = [("perceptron", True), ("gpt2", False), ("llama", False), ("llama", True), ("bert", False), ("bert", True)]


@pytest.mark.parametrize(
    ("kind", "trained"), [*_FAST, *(pytest.param(*case, marks=pytest.mark.slow) for case in _SLOW)]
)
def test_top_ten_of_both_sides_to_1e4(kind, trained):
    model, batch, losses = make(kind)
    if trained:
        train(model, batch, losses)
    model.double()
    operator = gs.hessian(model, losses, batch)
    dense = operator.dense()
    exact = torch.linalg.eigvalsh((dense + dense.T) / 2).flip(0).numpy()
    expected = np.r_[exact[:10], exact[-10:]]
    for method in ("full", "sketched-basis"):
        steps = min(operator.n, 600)
        result = gs.spectrum(operator, 10, which="both", method=method, steps=steps, tolerance=1e-4)
        assert result.converged.all(), method
        np.testing.assert_allclose(result.values, expected, rtol=1e-4)
        assert result.r_neg == pytest.approx(-exact[-1] / exact[0], rel=1e-4)


def test_agrees_with_scipy_on_the_same_operator():
    from scipy.sparse.linalg import eigsh

    model, batch, losses = make("perceptron")
    operator = gs.hessian(model, losses, batch)
    expected = eigsh(operator.to_scipy(), k=6, which="LM", return_eigenvectors=False)
    result = gs.spectrum(operator, 6, method="sketched-basis", tolerance=1e-5)
    np.testing.assert_allclose(np.sort(result.values), np.sort(expected), rtol=1e-4)
