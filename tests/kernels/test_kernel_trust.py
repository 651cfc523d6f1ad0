"""A kernel is used where it was right once; anything else is a warning, and torch's own result."""

import copy
import pickle
import subprocess
import sys

import pytest
import torch

import gradsketch as gs
from gradsketch.errors import GradsketchWarning
from gradsketch.kernels import SignedBlocks, definition, switched_off, trust
from kernels.without_gpu import Recorder

N, D = 20_003, 100


class Right:
    """Launches that do what the definition says, on the CPU: a GPU that works."""

    def __init__(self, wrong=lambda out: None):
        self.launches, self._wrong = [], wrong

    def __call__(self, program, grid, *arguments, together):
        self.launches.append(program)
        if program == "add_rows":
            partial, out, terms, width = arguments
            torch.sum(partial.view(len(out), terms, width), 1, out=out)
            self._wrong(out)
        elif program.startswith("fold"):
            x, partial, identity = arguments[:3]
            first, second = self.streams(identity, program)
            width = partial.shape[1] // arguments[5]
            partial.zero_()
            partial[:, :width] = definition.folded(x.float(), width, first, second)
        else:
            u, out, identity, n, _ = arguments
            out.copy_(definition.repeated(u, n, *self.streams(identity, program)))
            self._wrong(out)

    def streams(self, identity, program):
        words = [word & 0xFFFFFFFF for word in identity.tolist()]
        first, second = gs.Stream(0, "a"), gs.Stream(0, "b")
        object.__setattr__(first, "_identity", tuple(words[:4]))
        object.__setattr__(second, "_identity", tuple(words[4:]))
        return first, second if program.endswith("blocks") else None


@pytest.mark.parametrize("kind", [gs.AFFD, gs.AFJL])
def test_a_kernel_that_is_right_is_tried_once_and_used(kernels_on_cpu, kind):
    device = Right()
    kernels_on_cpu(device)
    phi = kind(N, D)
    x, w = torch.randn(2, N), torch.randn(2, D)
    came, lifted = phi(x), phi.lift(w)
    first = len(device.launches)
    phi(x), phi.lift(w)
    assert first > len(device.launches) - first == 3
    with switched_off():
        assert not torch.equal(came, torch.zeros_like(came))
        torch.testing.assert_close(came, phi(x), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(lifted, phi.lift(w), rtol=1e-5, atol=1e-5)
    assert len(device.launches) == first + 3


@pytest.mark.parametrize(
    "wrong",
    [
        lambda out: out.view(-1)[:1].neg_(),
        lambda out: out.mul_(1 + 1e-4),
        lambda out: out.view(-1)[-1:].fill_(float("nan")),
        lambda out: out.zero_(),
    ],
    ids=["a sign", "a scale", "a NaN", "nothing written"],
)
def test_a_kernel_that_differs_is_not_used(kernels_on_cpu, wrong):
    kernels_on_cpu(Right(wrong))
    phi, x, w = gs.AFFD(N, D), torch.randn(2, N), torch.randn(2, D)
    with pytest.warns(GradsketchWarning, match=r"fold_blocks .* differs from torch by"):
        came = phi(x)
    with pytest.warns(GradsketchWarning, match=r"repeat_blocks .* differs from torch by"):
        lifted = phi.lift(w)
    with switched_off():
        assert torch.equal(came, phi(x))
        assert torch.equal(lifted, phi.lift(w))
    phi(x)  # said once: warnings are errors here


def test_a_kernel_that_cannot_be_compiled_is_not_used(kernels_on_cpu):
    def start(*_, **__):
        raise RuntimeError("no kernel image\nand much more")

    kernels_on_cpu(start)
    phi, x = gs.AFJL(N, D), torch.randn(2, N)
    with pytest.warns(GradsketchWarning, match=r"failed with RuntimeError \(no kernel image\)\. torch's own"):
        came = phi(x)
    with switched_off():
        assert torch.equal(came, phi(x))


def test_a_device_without_room_for_the_trial_is_tried_again(kernels_on_cpu):
    def start(*_, **__):
        raise torch.OutOfMemoryError("no room")

    kernels_on_cpu(start)
    phi, x = gs.AFFD(N, D), torch.randn(2, N)
    with pytest.raises(torch.OutOfMemoryError):
        phi(x)
    device = Right()
    kernels_on_cpu(device)
    phi(x)
    assert device.launches


def test_each_variant_that_triton_compiles_has_a_trial_of_its_own(kernels_on_cpu, monkeypatch):
    kernels_on_cpu(Recorder())
    tried = []
    monkeypatch.setattr(trust, "_passes", lambda name, like, trial: tried.append((name, like.dtype)) or True)
    for n in (40_000, 40_003):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            memory = torch.zeros(n + 1, dtype=dtype)
            for x in (memory[:-1], memory[1:], memory[:-1]):
                gs.AFFD(n, D)._form._kernel.can_fold(x[None])
    assert len(tried) == 2 * 3 * 2


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.randn(2, N, dtype=torch.float64),
        lambda: torch.randn(2, N).to("meta"),
        lambda: torch.randn(2, N).as_subclass(type("Other", (torch.Tensor,), {})),
    ],
    ids=["float64", "another device", "a tensor of another kind"],
)
def test_what_no_kernel_is_for_is_left_to_torch(kernels_on_cpu, make):
    recorder = Recorder()
    kernels_on_cpu(recorder)
    assert not gs.AFFD(N, D)._form._kernel.can_fold(make())
    assert recorder.launches == []


@pytest.mark.parametrize(
    ("kind", "options", "n"),
    [
        ("AFFD", {"diagonal": "gaussian"}, N),
        ("AFFD", {"form": "global"}, N),
        ("AFFD", {}, 2000),
        ("AFJL", {"form": "paper"}, N),
        ("FJL", {}, N),
    ],
    ids=str,
)
def test_other_forms_are_left_to_torch(kernels_on_cpu, kind, options, n):
    recorder = Recorder()
    kernels_on_cpu(recorder)
    getattr(gs, kind)(n, D, **options)(torch.randn(n))
    assert [name for name, *_ in recorder.launches if name.endswith("blocks")] == []


def test_copies_and_pickles_hold_nothing_of_a_device():
    blocks = SignedBlocks(gs.Stream(0, "a"), None)
    blocks._identity(torch.zeros(1))
    for other in (copy.deepcopy(blocks), pickle.loads(pickle.dumps(blocks))):
        assert other == blocks
        assert other._identities == {}


def test_importing_gradsketch_imports_no_triton():
    code = (
        "import sys, gradsketch as gs, torch; gs.AFFD(9000, 64)(torch.zeros(9000)); assert 'triton' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
