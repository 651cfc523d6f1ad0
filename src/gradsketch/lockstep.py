"""Ranks that go in step: each takes the steps of the others on data of its own, and all of them end together.

Before ranks exchange anything, each says what it is about to do. So ranks that went different ways all learn of it, and
none waits for ever for a message that another never sends. A rank that fails says so in the place of its next step, and
every other rank raises the same error. What remains is a process that dies, which torchrun notices.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import IntEnum
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from gradsketch.errors import FingerprintError, GradsketchError, InputError, NonFiniteError, StoreError, leave_to_others

__all__ = ["Lockstep", "in_step"]

P = ParamSpec("P")
R = TypeVar("R")


def _collective(name: str, former: str) -> Any:
    return getattr(torch.distributed, name, None) or getattr(torch.distributed, former)


class _Step(IntEnum):
    """What a rank is about to do."""

    GATHER = 0
    SCATTER = 1
    COMPARE = 2
    MEET = 3
    END = 4
    FAIL = 5


_KINDS = {kind.__name__: kind for kind in (FingerprintError, InputError, NonFiniteError, StoreError)}
_WORDS = {
    _Step.GATHER: "gathers tensor",
    _Step.SCATTER: "adds up gradient",
    _Step.COMPARE: "compares number",
    _Step.MEET: "comes to layer",
    _Step.END: "is done with block",
}


class _FailedElsewhereError(BaseException):
    """Another rank failed. Goes up to the block in which that rank did, and turns into ``error`` there.

    Code on the way that takes any ``Exception`` for an answer must not take this one.
    """

    def __init__(self, depth: int, error: Exception) -> None:
        super().__init__(str(error))
        self.depth, self.error = depth, error


class Lockstep:
    """The ranks of a process group; without a group, this process alone, for whom every exchange is nothing.

    What ranks exchange, they exchange inside ``together()``. Such blocks may be nested: an error that is caught between
    two of them is caught on every rank.
    """

    def __init__(self, group: Any = None, device: torch.device | str = "cpu") -> None:
        self._group, self._device, self._depth, self._broken = group, device, 0, False
        self.rank, self.ranks = (
            (0, 1) if group is None else (torch.distributed.get_rank(group), torch.distributed.get_world_size(group))
        )

    @property
    def several(self) -> bool:
        """Whether there are other ranks."""
        return self.ranks > 1

    @contextmanager
    def together(self) -> Iterator[None]:
        """Have every rank leave the block in the same way.

        Raises:
            Exception: what was raised here, or of what another rank raised the same sentence.
        """
        if not self.several:
            yield
            return
        self._depth += 1
        try:
            yield
            self._meet(_Step.END, self._depth)
        except _FailedElsewhereError as failed:
            if failed.depth < self._depth:
                raise
            if failed.depth > self._depth:  # the other failed further in, and leaves this block next
                self._tell(failed.error)
            raise failed.error from None
        except Exception as error:
            self._tell(error)
            raise
        finally:
            self._depth -= 1

    def gather(self, piece: Tensor, place: int) -> Tensor:
        """Return the pieces of all ranks, of equal length, one after the other; ``place`` tells tensors apart."""
        if not self.several:
            return piece
        out = piece.new_empty(self.ranks * len(piece))
        self._meet(_Step.GATHER, place)
        self._do(_collective("all_gather_single", "all_gather_into_tensor"), out, piece)
        return out

    def scatter(self, whole: Tensor, place: int) -> Tensor:
        """Return this rank's piece of the sum of all ranks' tensors."""
        if not self.several:
            return whole
        out = whole.new_empty(len(whole) // self.ranks)
        self._meet(_Step.SCATTER, place)
        self._do(_collective("reduce_scatter_single", "reduce_scatter_tensor"), out, whole)
        return out

    def meet(self, place: int) -> None:
        """Wait for every rank to come to a place, from which they go on to exchanges of somebody else's."""
        self._meet(_Step.MEET, place)

    def most(self, *numbers: int) -> tuple[int, ...]:
        """Return the largest of each number over all ranks."""
        if not self.several:
            return numbers
        every = self.gather(torch.tensor(numbers, dtype=torch.int64, device=self._device), -2)
        return tuple(every.view(self.ranks, -1).amax(0).tolist())

    def first(self, values: Tensor) -> Tensor:
        """Return what the first rank holds of a vector, of equal length on every rank."""
        return self.gather(values, -3)[: len(values)]

    def any(self, condition: bool) -> bool:
        """Whether a condition holds on any rank."""
        return any(self._meet(_Step.COMPARE, 1, int(condition)))

    def all(self, condition: bool) -> bool:
        """Whether a condition holds on every rank."""
        return all(self._meet(_Step.COMPARE, 2, int(condition)))

    def total(self, count: int) -> int:
        """Return the sum of a count over all ranks."""
        return sum(self._meet(_Step.COMPARE, 3, count))

    def sum(self, value: float) -> float:
        """Return the sum of a number over all ranks, the same bits on each."""
        if not self.several:
            return value
        bits = self._meet(_Step.COMPARE, 4, struct.unpack("q", struct.pack("d", value))[0])
        return math.fsum(struct.unpack("d", struct.pack("q", one))[0] for one in bits)

    def sums(self, values: Tensor) -> Tensor:
        """Return the sum of a vector over all ranks, the same bits on each."""
        return self.gather(values, -1).view(self.ranks, *values.shape).sum(0) if self.several else values

    def same(self, number: int) -> bool:
        """Whether a number is the same on every rank."""
        return len(set(self._meet(_Step.COMPARE, 5, number))) == 1

    def _meet(self, step: _Step, place: int, number: int = 0) -> list[int]:
        """Say what this rank does next, learn what the others do, and return the number that each brings."""
        if not self.several:
            return [number]
        rows = self._exchange(step, place, number)
        if any(row[0] == _Step.FAIL for row in rows):
            failure = self._failure(rows, None)
            raise failure if self._depth else failure.error  # outside of every block nobody would turn it into this
        if len({tuple(row[:2]) for row in rows}) > 1:
            ways = {f"rank {rank} {_WORDS[_Step(row[0])]} {row[1]}" for rank, row in enumerate(rows)}
            raise InputError(
                f"ranks that went different ways: {', '.join(sorted(ways))}",
                "the same layers in the same order on every rank",
                "Look for a pass, or a layer such as an expert of a mixture, that one rank takes and another does not",
            )
        return [row[3] for row in rows]

    def _tell(self, error: Exception) -> None:
        """Tell the others of an error of this rank's, unless that is that they cannot be reached."""
        if self._broken:
            return
        rows = self._exchange(_Step.FAIL, 0, 0)
        failure = self._failure(rows, error)
        if failure.depth < self._depth:
            raise failure from error

    def _exchange(self, step: _Step, place: int, number: int) -> list[list[int]]:
        own = torch.tensor([step, place, self._depth, number], dtype=torch.int64, device=self._device)
        out = own.new_empty(self.ranks * 4)
        self._do(_collective("all_gather_single", "all_gather_into_tensor"), out, own)
        return out.view(self.ranks, 4).tolist()

    def _failure(self, rows: list[list[int]], own: Exception | None) -> _FailedElsewhereError:
        told: list[Any] = [None] * self.ranks
        self._do(torch.distributed.all_gather_object, told, None if own is None else _described(own))
        depth, first = min((row[2], rank) for rank, row in enumerate(rows) if row[0] == _Step.FAIL)
        if own is not None and told[self.rank] in told[: self.rank]:
            leave_to_others(own)
        return _FailedElsewhereError(depth, _made_again(first, *told[first]))

    def _do(self, collective: Any, *tensors: Any) -> None:
        try:
            collective(*tensors, group=self._group)
        except Exception:  # whatever a backend raises: nothing can be told to ranks that cannot be reached
            self._broken = True
            raise


def in_step(function: Callable[P, R]) -> Callable[P, R]:
    """Have the ranks of an operator, the first argument of a function, leave the function in the same way."""

    @wraps(function)
    def together(*args: P.args, **kwargs: P.kwargs) -> R:
        operator = args[0] if args else kwargs.get("operator")
        with getattr(operator, "ranks", Lockstep()).together():
            return function(*args, **kwargs)

    return together


def _described(error: Exception) -> tuple[str, tuple[str, ...]]:
    if isinstance(error, GradsketchError):
        return type(error).__name__, (error.came, error.wanted, error.fix)
    return "", (f"{type(error).__name__}: {error}",)


def _made_again(rank: int, name: str, words: tuple[str, ...]) -> Exception:
    kind: Any = _KINDS.get(name, GradsketchError) if name else RuntimeError
    made: Exception = kind(f"on rank {rank}: {words[0]}", *words[1:])
    leave_to_others(made)
    return made
