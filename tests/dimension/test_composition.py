"""A Subspace composes with what else puts tensors in the place of parameters: curvature, adapters, callbacks."""

import copy
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import gradsketch as gs

transformers = pytest.importorskip("transformers")

V = 20


def language_model() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=V, n_positions=16, attn_pdrop=0.0)
    config._attn_implementation = "eager"
    return transformers.GPT2LMHeadModel(config).eval()


def rows(count: int = 8) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [{"input_ids": ids, "labels": ids} for ids in torch.randint(V, (count, 6), generator=generator)]


TASK = gs.CausalLM()
BATCH = {name: torch.stack([row[name] for row in rows()]) for name in ("input_ids", "labels")}


def moved(subspace: gs.Subspace, std: float = 0.3) -> gs.Subspace:
    with torch.no_grad():
        subspace.w.normal_(std=std, generator=torch.Generator().manual_seed(2))
    return subspace


def projected(build, model: nn.Module, sketch, names: tuple[str, ...], **options: object) -> Tensor:
    """Return Phi H Phiᵀ of an ordinary model, a column at a time."""
    H = build(model, TASK, BATCH, gs.Parameters(model, names, frozen=True), **options)
    return torch.stack([sketch(H(column)) for column in sketch.lift(torch.eye(sketch.d))], dim=1)


def test_a_callback_takes_spectra_of_the_subspace_that_a_trainer_trains(tmp_path: Path) -> None:
    base = language_model()
    reference, names = copy.deepcopy(base), gs.Parameters(base).names
    sketch = gs.AFFD(gs.Parameters(base).n, 12)
    callback = gs.SpectrumCallback(TASK, BATCH, k=3, at=(0, 4), every=0, progress=False)
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=4, learning_rate=0.05, report_to="none", use_cpu=True, disable_tqdm=True
    )
    subspace = gs.Subspace(base, None, sketch)
    transformers.Trainer(subspace, arguments, train_dataset=rows(), callbacks=[callback]).train()
    assert callback.evolution.steps == (0, 4)
    assert subspace.w.abs().max() > 0.05
    for spectrum, point in zip(callback.evolution.spectra, (reference, subspace.merge().eval()), strict=True):
        values = torch.linalg.eigvalsh(projected(gs.hessian, point, sketch, names))
        wanted = values[values.abs().argsort(descending=True)][:3]
        torch.testing.assert_close(torch.tensor(spectrum.values[:3]).float(), wanted, rtol=1e-2, atol=1e-4)


def adapted() -> nn.Module:
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    config = peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=False)
    return peft.get_peft_model(language_model(), config).eval()


def test_adapters_in_a_subspace() -> None:
    model = adapted()
    parameters = gs.Parameters(model)
    assert all("lora_" in name for name in parameters.names)
    subspace = moved(gs.Subspace(model, parameters, gs.AFFD(parameters.n, 8)))
    point = adapted()
    theta = parameters.unflatten(parameters.flatten() + subspace.sketch.lift(subspace.w.detach()))
    with torch.no_grad():
        for name, parameter in gs.Parameters(point):
            parameter.copy_(theta[name])
    torch.testing.assert_close(subspace(**BATCH).logits, point(**BATCH).logits)
    ours = gs.hessian(subspace, TASK, BATCH).dense(torch.float32)
    torch.testing.assert_close(
        ours, projected(gs.hessian, point, subspace.sketch, parameters.names), rtol=1e-3, atol=1e-5
    )
    with model.disable_adapter():
        torch.testing.assert_close(subspace(**BATCH).logits, language_model()(**BATCH).logits)
    merged = subspace.merge().merge_and_unload()
    torch.testing.assert_close(merged(**BATCH).logits, point(**BATCH).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-5), (torch.bfloat16, 0.2)])
def test_products_are_held_against_differences_in_float64(dtype: torch.dtype, error: float) -> None:
    """Steps of w that the weights' own precision would swallow, for the lift follows what stands for w."""
    subspace = moved(gs.Subspace(language_model().to(dtype), None, gs.AFFD(gs.Parameters(language_model()).n, 8)))
    H = gs.hessian(subspace, TASK, BATCH)
    ours = H.dense(torch.float32)
    assert H.check is not None
    assert H.check.scheme in ("steps of 1e-06 in float64", "steps of 1e-08 in float64")
    assert H.check.error < error
    assert subspace(**BATCH).logits.dtype == dtype
    differences = gs.hessian(subspace, TASK, BATCH, mode="central-difference").dense(torch.float32)
    torch.testing.assert_close(differences, ours, rtol=error, atol=error * ours.abs().max().item())


# bfloat16 leaves no difference steady enough to check products of the subspace against, and they say so.
@pytest.mark.filterwarnings("ignore:.*not checked:gradsketch.errors.GradsketchWarning")
@pytest.mark.parametrize("build", [gs.hessian, gs.gauss_newton, gs.fisher])
def test_curvature_under_autocast_is_that_of_the_point_under_autocast(build) -> None:
    def losses(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(batch[0])
        return cross_entropy(logits.float(), batch[1], reduction="none")

    def net() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))

    batch = torch.randn(16, 6, generator=torch.Generator().manual_seed(1)), torch.arange(16) % 3
    model = net()
    parameters = gs.Parameters(model)
    subspace = moved(gs.Subspace(model, parameters, gs.AFFD(parameters.n, 8)))
    ours = build(subspace, losses, batch)(torch.ones(8))
    point, phi = moved(gs.Subspace(net(), None, subspace.sketch)).merge(), subspace.sketch
    theirs = phi(build(point, losses, batch)(phi.lift(torch.ones(8))))
    torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.02 * theirs.abs().max().item())


def test_checkpointed_layers_are_run_again_at_the_point() -> None:
    plain, again = language_model(), language_model()
    again.gradient_checkpointing_enable({"use_reentrant": False})
    gradients: dict[str, Tensor] = {}
    for name, model in (("plain", plain), ("again", again)):
        subspace = moved(gs.Subspace(model.train(), None, gs.AFFD(gs.Parameters(model).n, 8)))
        torch.manual_seed(0)
        losses: Mapping[str, Tensor] = subspace(**BATCH)
        losses["loss"].backward()
        gradients[name] = subspace.w.grad
    torch.testing.assert_close(gradients["again"], gradients["plain"])
