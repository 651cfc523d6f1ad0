"""Which operations an autograd graph is made of, and which of them cannot be trusted to be differentiated twice."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction

__all__ = ["REENTRANT", "causes", "counted_bytes", "narrowest", "nodes_of", "operations", "suspects"]

# Operations of PyTorch's own whose double backward is wrong without an error (2.13, on the CPU).
_WRONG_IN_PYTORCH = frozenset({"WeightNormInterfaceBackward0"})
_HAND_WRITTEN = "hand-written "
# The node of a layer that is checkpointed in the re-entrant way.
REENTRANT = _HAND_WRITTEN + "CheckpointFunctionBackward"


def operations(nodes: Iterable[Any]) -> set[str]:
    """Return the names of all operations in a graph."""
    return {(_HAND_WRITTEN if _is_hand_written(node) else "") + type(node).__name__ for node in nodes_of(nodes)}


def nodes_of(roots: Iterable[Any]) -> set[Any]:
    """Return all nodes of a graph."""
    seen: set[Any] = set()
    left = list(roots)
    while left:
        node = left.pop()
        if node is not None and node not in seen:
            seen.add(node)
            left.extend(following for following, _ in node.next_functions)
    return seen


def narrowest(roots: Iterable[Any]) -> torch.dtype:
    """Return the least exact floating dtype that a graph computes in; float64 of an empty one."""
    found = {kept.dtype for node in nodes_of(roots) for kept in getattr(node, "_input_metadata", ())}
    return max((kind for kind in found if kind.is_floating_point), key=_rounding, default=torch.float64)


def _rounding(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps


def _is_hand_written(node: Any) -> bool:
    """Whether nobody knows that an operation's backward can be differentiated; of our own functions we do."""
    return isinstance(node, BackwardCFunction) and not getattr(
        getattr(node, "_forward_cls", None), "is_differentiable_twice", False
    )


def suspects(names: Iterable[str]) -> set[str]:
    """Return the operations whose double backward cannot be taken on trust."""
    return {name for name in names if name.startswith(_HAND_WRITTEN) or name in _WRONG_IN_PYTORCH}


def causes(suspected: Iterable[str]) -> str:
    """Return a clause that names operations that may be why a product is wrong."""
    named = {name.removeprefix(_HAND_WRITTEN): name.startswith(_HAND_WRITTEN) for name in sorted(suspected)}
    why = {True: "a hand-written function", False: "whose double backward is wrong in PyTorch"}
    return "".join(f"; the loss goes through {name}, {why[own]}" for name, own in named.items())


@contextmanager
def counted_bytes() -> Iterator[dict[int, int]]:
    """Yield the bytes of each memory block that graphs built inside keep."""
    blocks: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        blocks[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # or an output that its own node keeps would never be freed

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept):
        yield blocks
