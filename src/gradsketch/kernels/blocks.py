"""Signs, a Hadamard transform of blocks, signs again and a fold, at one read of the vector; and the adjoint."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int32
from torch import Tensor

from gradsketch.kernels import definition
from gradsketch.kernels.plan import BLOCK, COLUMNS, FoldPlan, Rounds, row_slices
from gradsketch.kernels.start import start
from gradsketch.kernels.trust import can_run_on, relative_error, trusted
from gradsketch.random import Stream

__all__ = ["SignedBlocks"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_ROUNDS = Rounds()
_TRIAL = Stream(0, "kernels", "trial")
_TRIAL_SIZES = ((1, 8192), (2, 64))  # rows and width: several classes, and several terms a block


@dataclass(frozen=True)
class SignedBlocks:
    """fold · second · (I ⊗ H_4096) · first, for two streams of signs; fold · first where ``second`` is None.

    Example:
        >>> blocks = SignedBlocks(gs.Stream(0, "B"), gs.Stream(0, "G"))
        >>> blocks.can_fold(torch.zeros(1, 10_000))  # no GPU, no kernel
        False
    """

    first: Stream
    second: Stream | None
    _identities: dict[torch.device, Int32[Tensor, " 8"]] = field(default_factory=dict, compare=False, repr=False)

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_identities": {}}  # copies and pickles make it again

    def can_fold(self, x: Float[Tensor, "b n"]) -> bool:
        """Whether ``fold`` may be used, after a trial at the first use."""
        if x.dtype not in _DTYPES or not can_run_on(x):
            return False
        variant = _variant(x)
        return trusted(f"fold_{self._kind}", x, variant, lambda: _fold_error(x, variant, self._kind))

    def can_repeat(self, u: Float[Tensor, "b width"], n: int) -> bool:
        """Whether ``repeat`` may be used, after a trial at the first use."""
        if u.dtype != torch.float32 or not can_run_on(u):
            return False
        aligned = n % 16 == 0
        return trusted(f"repeat_{self._kind}", u, aligned, lambda: _repeat_error(u, aligned, self._kind))

    def fold(self, x: Float[Tensor, "b n"], width: int) -> Float[Tensor, "b width"]:
        """Return the folded vectors, float32; ``width`` is a power of two. Bits do not depend on the batch."""
        out = x.new_empty(len(x), width, dtype=torch.float32)
        together = getattr(_ROUNDS, self._kind)
        plan = FoldPlan.of(x.shape[-1], width, together)
        columns = -(-width // COLUMNS)
        for rows in row_slices(len(x), 4 * plan.partial):
            count = rows.stop - rows.start
            partial = out[rows] if plan.terms == 1 else out.new_empty(count, plan.partial)
            work = x[rows], partial, self._identity(x), plan.n, plan.classes, plan.splits
            start(f"fold_{self._kind}", (plan.programs, count), *work, together=together)
            if plan.terms > 1:
                start("add_rows", (columns, count), partial, out[rows], plan.terms, width, together=_ROUNDS.terms)
        return out

    def repeat(self, u: Float[Tensor, "b width"], n: int) -> Float[Tensor, "b n"]:
        """Return the adjoint of ``fold``, float32."""
        out = u.new_empty(len(u), n)
        together = getattr(_ROUNDS, self._kind)
        whole = u.repeat(1, max(1, BLOCK // u.shape[-1]))
        classes = whole.shape[-1] // BLOCK
        programs = -(-n // (BLOCK * together))
        for rows in row_slices(len(u), 1):
            work = whole[rows], out[rows], self._identity(u), n, classes
            start(f"repeat_{self._kind}", (programs, rows.stop - rows.start), *work, together=together)
        return out

    @property
    def _kind(self) -> str:
        return "signs" if self.second is None else "blocks"

    def _identity(self, like: Tensor) -> Int32[Tensor, " 8"]:
        """Return the words that name both streams, on the device."""
        if like.device not in self._identities:
            words = self.first.identity + (self.second or self.first).identity
            self._identities[like.device] = torch.tensor(words, device="cpu").to(torch.int32).to(like.device)
        return self._identities[like.device]


def _variant(x: Tensor) -> tuple[bool, bool]:
    """Return what of a tensor decides how Triton compiles: whether rows and their memory begin at multiples of 16."""
    return x.shape[-1] % 16 == 0, x.data_ptr() % 16 == 0


def _fold_error(like: Tensor, variant: tuple[bool, bool], kind: str) -> float:
    """Return the relative error on vectors that end within a block, and begin in memory as ``like`` does."""
    blocks = _trial_blocks(kind)
    n = 40_000 if variant[0] else 40_003
    memory = _TRIAL.normals(0, 2 * n + 1).to(like.dtype).to(like.device)
    x = (memory[:-1] if variant[1] else memory[1:]).view(2, n)
    worst = 0.0
    for rows, width in _TRIAL_SIZES:
        exact = definition.folded(x[:rows], width, blocks.first, blocks.second)
        worst = max(worst, relative_error(blocks.fold(x[:rows], width), exact))
    return worst


def _repeat_error(like: Tensor, aligned: bool, kind: str) -> float:
    blocks, n, worst = _trial_blocks(kind), 40_000 if aligned else 40_003, 0.0
    for rows, width in _TRIAL_SIZES:
        u = _TRIAL.normals(0, rows * width).to(like.device).view(rows, width)
        exact = definition.repeated(u, n, blocks.first, blocks.second)
        worst = max(worst, relative_error(blocks.repeat(u, n), exact))
    return worst


def _trial_blocks(kind: str) -> SignedBlocks:
    return SignedBlocks(_TRIAL.child("B"), None if kind == "signs" else _TRIAL.child("G"))
