"""An ordered selection of a model's parameters, seen as one vector of length n."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatchcase

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from gradsketch.errors import InputError
from gradsketch.fsdp import at_rest, whole
from gradsketch.stand_ins import ALONE

__all__ = ["Parameters", "Selection", "bare", "selected"]


class Parameters:
    """The trainable parameters of a model whose names match ``include`` and not ``exclude``.

    Globs are matched against every name a parameter has, ties are counted once under their first name, and the order
    is the model's own. Frozen parameters are left out unless ``frozen=True``; integers, in which quantised weights are
    stored, always, because nothing can be differentiated by them. Holds references to the live tensors.

    Example:
        >>> model = torch.nn.Linear(3, 2)
        >>> parameters = gs.Parameters(model, exclude="bias")
        >>> parameters.n, parameters.names
        (6, ('weight',))

    Raises:
        InputError: a glob matches nothing, or nothing is left.
    """

    def __init__(
        self,
        model: nn.Module,
        include: str | Iterable[str] = "*",
        exclude: str | Iterable[str] = (),
        *,
        frozen: bool = False,
    ) -> None:
        include, exclude = _as_tuple(include), _as_tuple(exclude)
        model = bare(model)
        aliases: dict[Tensor, list[str]] = {}
        with ALONE:
            at_rest(model)
            named = list(model.named_parameters(remove_duplicate=False))
        _refuse_uninitialised(named)
        for name, tensor in named:
            aliases.setdefault(tensor, []).append(name)
        for glob in (*include, *exclude):
            _check_glob(model, glob, aliases, frozen or glob in exclude)
        chosen = {
            names[0]: tensor
            for tensor, names in aliases.items()
            if _is_differentiable(tensor) and _matches(names, include) and not _matches(names, exclude)
        }
        self._tensors = {name: t for name, t in chosen.items() if frozen or t.requires_grad}
        if not self._tensors:
            raise InputError(
                f"none of {len(aliases)} parameters is selected ({len(chosen)} match but are frozen)",
                "at least one trainable parameter",
                "Widen include, call model.requires_grad_(True), or pass frozen=True",
            )

    @property
    def names(self) -> tuple[str, ...]:
        """Names in order, the first one of each tied group."""
        return tuple(self._tensors)

    @property
    def n(self) -> int:
        """Total number of entries."""
        return sum(t.numel() for t in self._tensors.values())

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """Shape of each parameter, by name."""
        return {name: t.shape for name, t in self._tensors.items()}

    def __len__(self) -> int:
        return len(self._tensors)

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return iter(self._tensors.items())

    def __repr__(self) -> str:
        return f"Parameters({len(self)} tensors, n={self.n})"

    def flatten(
        self, tensors: Mapping[str, Tensor] | None = None, *, dtype: torch.dtype | None = None
    ) -> Float[Tensor, " n"]:
        """Concatenate tensors given by name (default: the parameters' current values, detached) into one vector."""
        tensors = {name: whole(t.detach()) for name, t in self} if tensors is None else tensors
        return torch.cat([tensors[name].reshape(-1).to(dtype or tensors[name].dtype) for name in self._tensors])

    def unflatten(self, vector: Float[Tensor, "... n"]) -> dict[str, Tensor]:
        """Split vectors into tensors by name, as views shaped ``[..., *shape]``.

        Raises:
            InputError: the last dim is not n.
        """
        if vector.shape[-1] != self.n:
            raise InputError(
                f"a vector of length {vector.shape[-1]}",
                f"length n={self.n}",
                "Use a vector made with these Parameters",
            )
        parts = vector.split([t.numel() for t in self._tensors.values()], dim=-1)
        return {
            name: part.view(*vector.shape[:-1], *tensor.shape) for (name, tensor), part in zip(self, parts, strict=True)
        }

    def fingerprint(self, *, content: bool = False) -> str:
        """Hash of names, shapes and dtypes, and of every value too where ``content`` is asked for."""
        facts = [(name, list(t.shape), str(t.dtype)) for name, t in self]
        digest = hashlib.sha256(json.dumps(facts).encode())
        if content:
            for _, t in self:
                digest.update(whole(t.detach()).cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()[:16]


# What every ``parameters=`` takes: a selection, globs of names, or None for all that is trainable.
Selection = Parameters | str | Iterable[str] | None


def selected(model: nn.Module, parameters: Selection) -> Parameters:
    """Return the selection that ``parameters`` names: itself, globs of names, or None for all that is trainable.

    Raises:
        InputError: a glob matches nothing, or nothing is left.
    """
    if isinstance(parameters, Parameters):
        return parameters
    return Parameters(model) if parameters is None else Parameters(model, parameters)


def bare(model: nn.Module) -> nn.Module:
    """Return the model inside wrappers for compilation or for several devices.

    The names of its parameters, and with them the random streams of sketches, are those of the model itself.
    """
    while True:
        if isinstance(inside := getattr(model, "_orig_mod", None), nn.Module):
            model = inside
        elif isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        else:
            return model


def _as_tuple(globs: str | Iterable[str]) -> tuple[str, ...]:
    return (globs,) if isinstance(globs, str) else tuple(globs)


def _refuse_uninitialised(named: Iterable[tuple[str, Tensor]]) -> None:
    for name, tensor in named:
        if is_lazy(tensor):
            raise InputError(
                f"parameter {name!r} of a lazy module, which has no shape yet",
                "parameters in memory",
                "Call the model on a batch once, which makes them",
            )


def _check_glob(model: nn.Module, glob: str, aliases: Mapping[Tensor, list[str]], frozen: bool) -> None:
    """Refuse a glob that selects nothing, or (unless ``frozen`` is allowed) only frozen parameters."""
    matched = [tensor for tensor, names in aliases.items() if _matches(names, (glob,))]
    if not matched and aliases:
        raise InputError(
            f"the glob {glob!r} matches no parameter of {type(model).__name__}",
            f"globs of names such as {', '.join(names[0] for names in list(aliases.values())[:3])}",
            "List them with [name for name, _ in model.named_parameters()]",
        )
    if matched and not any(map(_is_differentiable, matched)):
        raise InputError(
            f"the glob {glob!r} matches only integers, in which quantised weights are stored",
            "parameters that can be differentiated by",
            "Name others, such as those of an adapter",
        )
    if not frozen and matched and not any(tensor.requires_grad for tensor in matched):
        raise InputError(
            f"the glob {glob!r} matches only frozen parameters",
            "at least one trainable parameter for every glob",
            "Call .requires_grad_(True) on them, or pass frozen=True",
        )


def _is_differentiable(tensor: Tensor) -> bool:
    """Whether a tensor holds no integers; complex ones are refused by name where gradients are asked for."""
    return tensor.is_floating_point() or tensor.is_complex()


def _matches(names: Iterable[str], globs: Iterable[str]) -> bool:
    return any(fnmatchcase(name, glob) for name in names for glob in globs)
