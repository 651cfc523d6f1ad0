"""Every situation is exact or refused: sketches, formed gradients and inner products, against autograd row by row."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from functools import cache
from typing import Any

import pytest
import torch
from situations import SITUATIONS, Setting, Situation
from torch import Tensor

import gradsketch as gs
from gradsketch.errors import GradsketchWarning, InputError
from gradsketch.gradients.data import each_tensor

EXACT = [s for s in SITUATIONS.values() if s.outcome != "refused"]
REFUSED = [s for s in SITUATIONS.values() if s.outcome == "refused"]


def rows_of(batch: Any, rows: list[int]) -> Any:
    return each_tensor(batch, lambda tensor: tensor.detach()[rows])


@contextmanager
def as_found(batch: Any) -> Iterator[None]:
    """The batch is the user's: nothing is written to it, and no field is lost."""
    before = copy.deepcopy(rows_of(batch, list(range(length(batch)))))
    yield
    found, now = (torch.utils._pytree.tree_flatten(b) for b in (before, batch))
    assert found[1] == now[1]
    assert all(torch.equal(a, b) for a, b in zip(found[0], now[0], strict=True))


@cache
def gradients(name: str) -> Tensor:
    """Gradients [b, n] by ``loss.backward()`` on a model of its own, each row alone."""
    setting = SITUATIONS[name].setting()
    parameters = [tensor for _, tensor in gs.Parameters(setting.model)]
    buffers = {name: buffer.clone() for name, buffer in setting.model.named_buffers()}
    found = []
    for row in range(length(setting.batch)):
        for buffer, value in buffers.items():  # every row finds the same model
            place, _, leaf = buffer.rpartition(".")
            setattr(setting.model.get_submodule(place), leaf, value.clone())
        loss = setting.losses(setting.model, rows_of(setting.batch, [row])).sum()
        for tensor in parameters:
            tensor.grad = None  # a loss may have run a backward pass of its own
        loss.backward()
        parts = [torch.zeros_like(t) if t.grad is None else t.grad.to_dense() for t in parameters]
        found.append(torch.cat([part.flatten() for part in parts]).double())
    return torch.stack(found)


def length(batch: Any) -> int:
    return len(next(iter(torch.utils._pytree.tree_leaves(batch))))


def check(got: Tensor, want: Tensor, tolerance: float) -> None:
    error = (got.double() - want).norm(dim=1)
    assert got.shape == want.shape
    assert not got.requires_grad
    assert bool((error <= tolerance * want.norm(dim=1) + tolerance * 1e-3).all()), f"errors {error / want.norm(dim=1)}"


@pytest.fixture
def what_is_slow_says_so(situation: Situation) -> Iterator[None]:
    """And nothing else does."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        yield
    ours = [str(w.message) for w in said if issubclass(w.category, GradsketchWarning)]
    assert bool(ours) == (situation.outcome == "slow"), ours


@cache
def setting_of(name: str) -> Setting:
    """One model for all tests of a situation, because a model is left as it was found."""
    return SITUATIONS[name].setting()


def sketcher_of(situation: Situation, sketch: Any, method: str = "auto") -> tuple[Any, Any]:
    setting = setting_of(situation.name)
    parameters = gs.Parameters(setting.model)
    phi = sketch(parameters)
    return setting, gs.GradientSketcher(setting.model, setting.losses, phi, parameters=parameters, method=method)


def blocks(parameters: gs.Parameters) -> gs.BlockSum:
    return gs.BlockSum(parameters, min(24, parameters.n))


def flat(parameters: gs.Parameters) -> gs.AFFD | gs.BlockSum:
    return gs.AFFD(parameters.n, min(24, parameters.n)) if parameters.n > 1 else blocks(parameters)


# Variants meet the same code behind the capture, so they see one sketch, the cheaper; -m slow runs all with all.
each_with_a_sketch = pytest.mark.parametrize(
    ("situation", "sketch"),
    [
        pytest.param(s, sketch, marks=() if s.first == (sketch is blocks) else pytest.mark.slow, id=f"{s.name}-{kind}")
        for s in EXACT
        for kind, sketch in (("BlockSum", blocks), ("AFFD", flat))
    ],
)
first_variants = pytest.mark.parametrize(
    "situation",
    [pytest.param(s, marks=() if s.first else pytest.mark.slow, id=s.name) for s in EXACT],
)


@each_with_a_sketch
@pytest.mark.usefixtures("what_is_slow_says_so")
def test_batches_of_any_size_and_order_are_exact(situation, sketch):
    setting, sketcher = sketcher_of(situation, sketch)
    want = sketcher.sketch(gradients(situation.name))
    with setting.around(), as_found(setting.batch):
        check(sketcher(setting.batch).values, want, situation.tolerance)
        for rows in ([4, 2, 1, 3, 0, 2], [2], *([[3, 1, 0]] if situation.first else [])):
            check(sketcher(rows_of(setting.batch, rows)).values, want[rows], situation.tolerance)
    globs = situation.slow
    slow = {name for name in gs.Parameters(setting.model).names if any(fnmatchcase(name, glob) for glob in globs)}
    assert set(sketcher.slow) == slow, dict(sketcher.slow)


@first_variants
@pytest.mark.usefixtures("what_is_slow_says_so")
def test_formed_gradients_and_inner_products_are_exact(situation):
    setting, sketcher = sketcher_of(situation, flat)
    want = gradients(situation.name)
    with setting.around():
        check(sketcher(rows_of(setting.batch, [3, 0, 4])).values, sketcher.sketch(want[[3, 0, 4]]), situation.tolerance)
        others = rows_of(setting.batch, [2, 0])
        gram = gs.gradient_gram(setting.model, setting.losses, setting.batch, others)
    scale = want.norm(dim=1)[:, None] * want[[2, 0]].norm(dim=1)[None]
    assert bool(((gram.double() - want @ want[[2, 0]].T).abs() <= 2 * situation.tolerance * (scale + 1e-3)).all())


@first_variants
def test_every_method_is_exact_or_refuses(situation):
    want = gradients(situation.name)
    for method in set(situation.methods) - {"auto"}:
        setting, sketcher = sketcher_of(situation, flat, method)
        with setting.around():
            if method == "outer" and situation.outcome == "slow":
                with pytest.raises(InputError, match="method='outer'"):
                    sketcher(setting.batch)
            else:
                check(sketcher(setting.batch).values, sketcher.sketch(want), situation.tolerance)


@pytest.mark.parametrize("situation", REFUSED, ids=lambda s: s.name)
@pytest.mark.filterwarnings("ignore::gradsketch.errors.GradsketchWarning")
def test_what_has_no_gradients_of_its_own_is_refused(situation):
    def run(sketch: Any, method: str) -> None:
        setting, sketcher = sketcher_of(situation, sketch, method)
        sketcher(setting.batch)

    for method in situation.methods:
        for sketch in (blocks, flat):
            with pytest.raises(InputError, match=situation.words):
                run(sketch, method)
        if method != "implicit":
            setting = setting_of(situation.name)
            with pytest.raises(InputError, match=situation.words):
                gs.gradient_gram(setting.model, setting.losses, setting.batch, method=method)


# Wrappers that spread a model over devices or processes.


@pytest.fixture
def one_process(tmp_path) -> Iterator[None]:
    """A process group of one rank."""
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


WRAPPERS = {"DataParallel": torch.nn.DataParallel, "DistributedDataParallel": torch.nn.parallel.DistributedDataParallel}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
@pytest.mark.parametrize("name", ["hooks_on_modules", "ordered[time first, merged]", "packs_padded_sequences[sorted]"])
def test_wrapped_models_give_the_very_sketches_of_the_bare_model(name, wrap, one_process):
    setting = SITUATIONS[name].setting()
    bare = gs.Parameters(setting.model)
    phi = flat(bare)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GradsketchWarning)
        want = gs.sketch_gradients(setting.model, setting.losses, setting.batch, phi, parameters=bare)
        wrapped = wrap(setting.model)
        got = gs.sketch_gradients(wrapped, setting.losses, setting.batch, phi, parameters=gs.Parameters(wrapped))
    assert torch.equal(got, want)


@pytest.mark.parametrize("method", ["auto", "outer", "loop"])
def test_shards_are_gathered_or_refused(method, one_process):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    setting = SITUATIONS["in_float32"].setting()
    phi = blocks(gs.Parameters(setting.model))
    want = gs.sketch_gradients(setting.model, setting.losses, setting.batch, phi)
    fully_shard(setting.model, mesh=init_device_mesh("cpu", (1,)))
    if method == "loop":
        with pytest.raises(InputError, match="of which ranks hold parts"):
            gs.sketch_gradients(setting.model, setting.losses, setting.batch, phi, method=method)
    else:
        assert torch.equal(gs.sketch_gradients(setting.model, setting.losses, setting.batch, phi, method=method), want)
