"""What an index is: the contents of its own ``index.json``, above those of its checkpoints' stores.

What was indexed (weights and buffers by hash, task, sketch, parameters, data) is recorded as facts. A resumed build or
a query compares them one by one, so a refusal names what differs. Of the data the facts hold the number of rows and a
hash of the first and the last one; each shard holds a hash of its own rows, which a resumed build compares.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from gradsketch.attribution.checkpoints import Checkpoint
from gradsketch.attribution.metric import coordinates_for, metric_facts
from gradsketch.durable import damaged, record_of, record_text, require_same
from gradsketch.errors import DamageError, FingerprintError, StoreError
from gradsketch.gradients.factors.factors import Factors
from gradsketch.gradients.fingerprints import model_facts, task_facts
from gradsketch.gradients.parameters import Parameters
from gradsketch.gradients.per_example.contributions import GradientSketch
from gradsketch.gradients.tasks import Task
from gradsketch.sketches.block_sum import BlockSum
from gradsketch.sketches.preconditioned import Preconditioned
from gradsketch.store.folder import Folder
from gradsketch.store.manifest import MANIFEST_NAME

__all__ = ["Description", "StoredCheckpoint", "comparable_facts", "sketch_facts", "sketch_for"]

_FORMAT, _VERSION = "gradsketch-index", 2


@dataclass(frozen=True)
class StoredCheckpoint:
    """One checkpoint of an index: its name, weight, folder, and where its weights were read (None: given in memory)."""

    name: str
    weight: float
    folder: str
    weights: str | None

    @classmethod
    def of(cls, checkpoint: Checkpoint, number: int) -> StoredCheckpoint:
        """Describe a checkpoint that is about to be indexed."""
        path = str(Path(checkpoint.weights).resolve()) if isinstance(checkpoint.weights, str | Path) else None
        return cls(checkpoint.name, checkpoint.weight, _folder(number), path)


@dataclass(frozen=True)
class Description:
    """Sketch size and seed, the parameters' names, the checkpoints, where the data came from, and the metric's name.

    ``settings`` are hashes of the numbers among the attributes of the model's modules; none where no model was seen.
    """

    d: int
    seed: int
    parameters: tuple[str, ...]
    checkpoints: tuple[StoredCheckpoint, ...]
    source: str
    precondition: str | None = None
    settings: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> str:
        """Return the text of the index's ``index.json``."""
        return record_text({"format": _FORMAT, "version": _VERSION, **asdict(self)})

    @classmethod
    def read(cls, folder: Folder) -> Description:
        """Read an index's ``index.json``.

        Raises:
            StoreError: there is none, or it is damaged or of a newer version.
        """
        if not folder.has(MANIFEST_NAME):
            raise StoreError(
                f"{folder.uri} holds no {MANIFEST_NAME}",
                "the folder of an index",
                "Check the path, or make one with build_index (gradsketch index)",
            )
        file = f"{folder.uri}/{MANIFEST_NAME}"
        body = _record(folder.read(MANIFEST_NAME).to_pybytes(), file)
        try:
            return cls._checked(body)
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise damaged(file, f"{type(error).__name__}: {error}") from error

    @classmethod
    def _checked(cls, body: Mapping[str, Any]) -> Description:
        """Return the description, every value of which is of its kind, and whose folders lie in the index."""
        checkpoints = tuple(StoredCheckpoint(**c) for c in body["checkpoints"])
        metric = body.get("precondition")
        settings = body.get("settings", {})
        found = cls(body["d"], body["seed"], tuple(body["parameters"]), checkpoints, body["source"], metric, settings)
        sound = all(isinstance(value, int) for value in (found.d, found.seed)) and found.d > 0
        sound = (
            sound
            and isinstance(metric, str | None)
            and isinstance(settings, dict)
            and bool(checkpoints)
            and all(isinstance(name, str) for name in found.parameters)
        )
        for number, checkpoint in enumerate(checkpoints):
            sound = sound and checkpoint.folder == _folder(number) and math.isfinite(checkpoint.weight)
        if not (sound and found.parameters):
            raise ValueError("values that no index has")
        return found

    def require_same(self, other: Description, source: str) -> None:
        """Check that a run with this description may go on with the index that has ``other``.

        Raises:
            FingerprintError: naming every field that differs.
        """
        here, there = asdict(self), asdict(other)
        for body in (here, there):
            body.pop("source")
            body.pop("settings")  # a counter of calls may be among them; a build that goes on compares losses
            body["parameters"] = _summary(body["parameters"])
        require_same(here, there, source)


def _folder(number: int) -> str:
    """Return the name of a checkpoint's folder: the number alone decides it, so that it never leads out of an index."""
    return f"checkpoint-{number}"


def _record(data: bytes, file: str) -> dict[str, Any]:
    """Return what stands in an index's ``index.json``; one of another format is told apart from a damaged one."""
    try:
        body = record_of(data, file)
    except DamageError:
        if b'"crc32"' in data:
            raise
        other = _without_checksum(data)  # version 1, and the file of a store, have none
        if other is None:
            raise
        body = other
    found = f"{body.get('format')} version {body.get('version')}"
    if found != f"{_FORMAT} version {_VERSION}":
        raise StoreError(
            f"{file} is of format {found}",
            f"{_FORMAT} version {_VERSION}",
            "Check that this is the folder of an index, not one of its checkpoints; or build it again",
        )
    return body


def _without_checksum(data: bytes) -> dict[str, Any] | None:
    try:
        body = json.loads(data)
    except (ValueError, RecursionError):
        return None
    sound = isinstance(body, dict) and {"format", "version"} <= body.keys()
    return body if sound and (body["format"], body["version"]) != (_FORMAT, _VERSION) else None


def sketch_for(model: nn.Module, description: Description, factors: Factors | None) -> GradientSketch:
    """Return the sketch with which an index was made, over this model's parameters and in its metric.

    Raises:
        FingerprintError: the model lacks some of them.
    """
    own = dict(model.named_parameters(remove_duplicate=False))
    missing = [name for name in description.parameters if name not in own]
    if missing:
        raise FingerprintError(
            f"{type(model).__name__} has no parameter {missing[0]!r} ({len(missing)} of {len(description.parameters)})",
            "the model with which the index was made",
            "Load that model, or build an index for this one",
        )
    parameters = Parameters(model, include=description.parameters, frozen=True)
    sketch = BlockSum(
        parameters, description.d, seed=description.seed, coordinates=coordinates_for(description.precondition)
    )
    return sketch if factors is None else factors.before(sketch)


def comparable_facts(
    model: nn.Module, task: Task, sketch: GradientSketch, description: Description, factors: Factors | None
) -> dict[str, Any]:
    """Return what must agree between an index and a query: model, task, sketch with its parameters, and the metric."""
    metric = {} if factors is None else {"metric": metric_facts(description.precondition, factors)}
    sketch = sketch.sketch if isinstance(sketch, Preconditioned) else sketch
    return {**metric, "model": model_facts(model), "task": task_facts(task), **sketch_facts(sketch)}


def sketch_facts(sketch: BlockSum) -> dict[str, Any]:
    """Return what must agree between two sketches that are compared: the map, and what it is over."""
    return {
        "sketch": {"kind": type(sketch).__name__, "d": sketch.d, "seed": sketch.seed, "hash": sketch.fingerprint},
        "parameters": {**_summary(sketch.names), "n": sketch.n},
    }


def _summary(names: Iterable[str]) -> Mapping[str, Any]:
    """Return parameter names so that a difference can be read."""
    names = list(names)
    digest = hashlib.sha256("\n".join(names).encode()).hexdigest()[:16]
    return {"tensors": len(names), "first": names[0], "last": names[-1], "hash": digest}
