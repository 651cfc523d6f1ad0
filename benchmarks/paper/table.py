"""What a script of this folder is to the runner: a table that can be run at three sizes, shown, and drawn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Results", "Size", "Table", "pick"]

T = TypeVar("T")
Size = Literal["tiny", "quick", "full"]
Results = dict[str, Any]


@dataclass(frozen=True)
class Table:
    """A table or figure of the paper.

    ``name`` is that of its script, its JSON and its picture. ``differs`` says in one or two sentences what is not as in
    the paper. ``minutes`` are those of a full run on two idle cores. ``run`` measures; ``show`` makes Markdown of what
    came out and of the paper's numbers, from the results alone; ``short`` gives what the paper found and what came out
    here, a few words each, for the README; ``draw`` makes the picture.
    """

    name: str
    title: str
    differs: str
    minutes: float
    run: Callable[[Size], Results]
    show: Callable[[Results], str]
    short: Callable[[Results], tuple[str, str]]
    draw: Callable[[Results], Figure] | None = None


def pick(size: Size, tiny: T, quick: T, full: T) -> T:
    """Return what belongs to a size."""
    return {"tiny": tiny, "quick": quick, "full": full}[size]
