"""How a sketch is made, and made again: its recipe, and the registry of kinds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from gradsketch.errors import FingerprintError, InputError
from gradsketch.sketches.base import Sketch

__all__ = ["made_from", "recipe_of", "register", "vector_kind", "vector_kinds"]

_Kind = TypeVar("_Kind", bound=type[Sketch])

_KINDS: dict[str, type[Sketch]] = {}


def register(kind: _Kind) -> _Kind:
    """Make a kind of sketch known by its class name: to recipes, to ``BlockSum(kind=...)`` and to the command line.

    A decorator, for your own kinds too.

    Raises:
        InputError: another class has that name already.
    """
    known = _KINDS.setdefault(kind.__name__, kind)
    if (known.__module__, known.__qualname__) != (kind.__module__, kind.__qualname__):
        raise InputError(f"a second kind of sketch named {kind.__name__}", "a name of its own", "Rename the class")
    _KINDS[kind.__name__] = kind  # a cell of a notebook that runs again defines the class anew
    return kind


def vector_kinds() -> dict[str, type[Sketch]]:
    """Return the kinds that ``kind(n, d, seed=seed)`` makes, by their names in lower case."""
    return {name.lower(): kind for name, kind in sorted(_KINDS.items()) if kind.from_sizes}


def vector_kind(name: str) -> type[Sketch]:
    """Return the kind with this name, in upper or lower case.

    Raises:
        InputError: there is none that ``kind(n, d, seed=seed)`` makes.
    """
    kinds = vector_kinds()
    if name.lower() not in kinds:
        names = ", ".join(kind.__name__ for kind in kinds.values())
        raise InputError(f"a sketch of kind {name}", f"one of {names}", "Type AFFD")
    return kinds[name.lower()]


def recipe_of(sketch: Sketch) -> dict[str, Any]:
    """Return how a sketch is made, as plain values that JSON keeps.

    Example:
        >>> from gradsketch.sketches.recipe import made_from, recipe_of
        >>> phi = gs.AFFD(1000, 64, seed=3)
        >>> made_from(recipe_of(phi)).fingerprint == phi.fingerprint
        True
    """
    arguments = {name: recipe_of(v) if isinstance(v, Sketch) else v for name, v in sketch.arguments().items()}
    return {"kind": type(sketch).__name__, "version": sketch.version, "arguments": arguments}


def made_from(recipe: Mapping[str, Any]) -> Sketch:
    """Return the sketch that a recipe describes.

    Raises:
        InputError: its kind is not registered, or it is no recipe.
        FingerprintError: its kind has changed since, and would map the same vector to other numbers.
    """
    if not recipe.keys() >= {"kind", "version", "arguments"}:
        raise InputError(
            f"a recipe with {', '.join(recipe)}", "kind, version and arguments", "Pass what recipe_of made"
        )
    kind = _KINDS.get(recipe["kind"])
    if kind is None:
        raise InputError(
            f"a sketch of kind {recipe['kind']}, which is not registered",
            f"one of {', '.join(sorted(name for name in _KINDS if not name.startswith('_')))}",
            "Import the module that registers it, or pass the sketch itself as sketch=...",
        )
    if recipe["version"] != kind.version:
        raise FingerprintError(
            f"a {kind.__name__} of version {recipe['version']}",
            f"version {kind.version}, which maps vectors to other numbers",
            "Make the sketches again, or install the gradsketch that made them",
        )
    build: Any = kind
    return _built(build, recipe["arguments"])


def _built(build: Any, arguments: Mapping[str, Any]) -> Sketch:
    inner = {name: made_from(v) if _is_recipe(v) else v for name, v in arguments.items()}
    made: Sketch = build(**inner)
    return made


def _is_recipe(value: Any) -> bool:
    return isinstance(value, Mapping) and value.keys() == {"kind", "version", "arguments"}
