"""Estimated factors of a metric: what they are, what they belong to, and the file that keeps them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gradsketch.durable import damaged, packed_tensors, read_bytes, require_same, unpacked_tensors, write_file
from gradsketch.errors import InputError
from gradsketch.gradients.fingerprints import model_facts
from gradsketch.gradients.parameters import bare
from gradsketch.linear_map import LinearMap
from gradsketch.sketches.block_sum import BlockSum
from gradsketch.sketches.preconditioned import Preconditioned
from gradsketch.sketches.roots import Roots, Stack, digest_of, roots_of, state_of

__all__ = ["Factors"]

_FORMAT, _VERSION = "gradsketch-factors", 1


@dataclass(frozen=True, eq=False)
class Factors:
    """P = F^(−1/2) for a metric F on gradients, as a matrix on each side of every parameter: see ``kfac``.

    ``facts`` say what decides the numbers (method, model, task, data, options); ``examples`` and ``seconds`` what the
    estimate took.

    Raises:
        InputError: a root that is zero or not finite, which would make all sketches zero or NaN.

    Example:
        >>> model = torch.nn.Linear(20, 2)
        >>> factors = gs.kfac(model, gs.Classification(), [(torch.randn(20), i % 2) for i in range(32)])
        >>> phi = factors.before(gs.BlockSum(gs.Parameters(model), 32))
        >>> phi(torch.randn(5, 42)).shape
        torch.Size([5, 32])
    """

    method: str
    roots: Roots
    facts: Mapping[str, Any]
    examples: int
    seconds: float

    def __post_init__(self) -> None:
        for name, root in self.roots.items():
            for pair in root.pairs if isinstance(root, Stack) else (root,):
                if not all(_has_numbers(side.values) for side in (pair.rows, pair.columns)):
                    raise InputError(
                        f"factors of {name!r} that are zero or not finite in {pair.rows.values.dtype}",
                        "a metric, with finite numbers",
                        "Type a damping nearer to 0.1; of an optimizer take one with ε and second moments above zero",
                    )

    @cached_property
    def fingerprint(self) -> str:
        """Hash of every number."""
        return digest_of(self.roots)

    def before(self, sketch: LinearMap) -> Preconditioned:
        """Return Phi P: the sketch of gradients that P was applied to.

        Raises:
            InputError: the sketch is no BlockSum, or is over other parameters.
        """
        if not isinstance(sketch, BlockSum):
            raise InputError(
                f"precondition={self.method!r} with {sketch!r}",
                "a BlockSum, which takes gradients parameter by parameter",
                "Type BlockSum(Parameters(model), d)",
            )
        missing = [name for name in sketch.blocks if name not in self.roots]
        if missing:
            raise InputError(
                f"factors without {missing[0]!r} ({len(missing)} of {len(sketch.blocks)} parameters)",
                "factors of all parameters that are sketched",
                "Make both from one selection: parameters=...",
            )
        return Preconditioned(sketch, {name: self.roots[name] for name in sketch.blocks})

    def require_of(self, model: nn.Module, source: str = "precondition=", fix: str | None = None) -> None:
        """Refuse factors of other weights than the model has now, which its shapes alone do not tell.

        Raises:
            FingerprintError: they are.
        """
        if "model" in self.facts:
            fix = fix or "Make the factors with the weights that are sketched"
            require_same({"model": model_facts(bare(model))}, {"model": self.facts["model"]}, source, fix=fix)

    def save(self, path: str | Path) -> None:
        """Write everything to a file, whole or not at all, with its checksum.

        Raises:
            StoreError: it cannot be written.
        """
        write_file(path, self.to_bytes())

    @classmethod
    def load(cls, path: str | Path) -> Factors:
        """Return what ``save`` wrote.

        Raises:
            StoreError: it is damaged, or cannot be read.
        """
        return cls.from_bytes(read_bytes(path), path)

    def to_bytes(self) -> bytes:
        """Return the contents of the file."""
        head = {"format": _FORMAT, "version": _VERSION, "method": self.method, "facts": dict(self.facts)}
        return packed_tensors(
            {**head, "examples": self.examples, "seconds": self.seconds, "roots": state_of(self.roots)}
        )

    @classmethod
    def from_bytes(cls, data: bytes, source: str | Path) -> Factors:
        """Return what ``to_bytes`` returned.

        Raises:
            DamageError: its checksum does not match, or it is no such file.
        """
        body = unpacked_tensors(data, source)
        try:
            if (body["format"], body["version"]) != (_FORMAT, _VERSION):
                raise ValueError(f"of format {body['format']} version {body['version']}")
            return cls(body["method"], roots_of(body["roots"]), body["facts"], body["examples"], body["seconds"])
        except InputError:
            raise
        except (LookupError, TypeError, ValueError) as error:
            raise damaged(source, f"{type(error).__name__}: {error}") from error


def _has_numbers(values: Tensor) -> bool:
    """Whether a root's numbers are finite, and none so small that products with the other side vanish."""
    largest = values.abs().max()
    return bool(torch.isfinite(largest)) and float(largest) > torch.finfo(values.dtype).tiny ** 0.75
