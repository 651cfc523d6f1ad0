"""The options that say who writes or reads shards: this process, several that share it, or workers of a Ray cluster."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from gradsketch.errors import InputError

if TYPE_CHECKING:
    from gradsketch.attribution.engine import Engine

__all__ = ["ReadingOptions", "WorkOptions"]


@dataclass(frozen=True)
class WorkOptions:
    """Who does the work."""

    worker: tuple[int, int] | None = None
    """I N: of N processes that run this at once, this is number I, counted from 0. Under torchrun, its rank and world
    size; otherwise one process."""
    engine: Literal["local", "ray"] = "local"
    """ray: workers of a Ray cluster write the shards."""
    workers: int | None = None
    """Workers of --engine ray; by default one per CPU, or per share of a GPU."""
    gpus_per_worker: float = 0.0
    """GPUs, or a share of one, for each worker of --engine ray."""
    address: str | None = None
    """Address of a Ray cluster; by default one is started on this machine, and ended with the run."""

    def share(self, environment: Mapping[str, str] = os.environ) -> tuple[int, int]:
        """Return (i, n): this is process i of n."""
        if self.worker is not None:
            return self.worker
        if "TORCHELASTIC_RUN_ID" in environment:  # set by torchrun alone, as RANK is not
            return int(environment["RANK"]), int(environment["WORLD_SIZE"])
        return 0, 1

    def chosen(self) -> Engine | None:
        """Return the engine, or None for this process.

        Raises:
            InputError: options of Ray without it, or two ways of sharing the work at once.
        """
        if self.engine == "ray":
            if self.share() != (0, 1):
                raise InputError("--engine ray in one of several processes", "one of the two", "Leave out --worker")
            from gradsketch.attribution.engine import Ray

            return Ray(self.workers, self.gpus_per_worker, self.address)
        if (self.workers, self.gpus_per_worker, self.address) != (None, 0.0, None):
            raise InputError(
                "--workers, --gpus-per-worker or --address without --engine ray",
                "an engine that has workers",
                "Type --engine ray, or share the work by --worker I N",
            )
        return None


@dataclass(frozen=True)
class ReadingOptions:
    """Who reads the shards."""

    engine: Literal["local", "ray"] = "local"
    """ray: tasks of a Ray cluster read the shards of a large index; gradients are formed here."""
    workers: int | None = None
    """Tasks of --engine ray at once; by default one per CPU."""
    address: str | None = None
    """Address of a Ray cluster; by default one is started on this machine, and ended with the command."""

    def chosen(self) -> Engine:
        """Return the engine.

        Raises:
            InputError: options of Ray without it.
        """
        from gradsketch.attribution.engine import Local, Ray

        if self.engine == "ray":
            if WorkOptions().share()[1] > 1:
                raise InputError("--engine ray under torchrun", "one of the two", "Ask in one process")
            return Ray(self.workers, address=self.address)
        if (self.workers, self.address) != (None, None):
            raise InputError(
                "--workers or --address without --engine ray", "an engine that has workers", "Type --engine ray"
            )
        return Local()
