"""Build an index: one pass over the training data, resumable at any moment, by any number of processes at once.

The data is read shard by shard, so the first gradients are formed at once and memory is bounded by a shard. A run that
goes on with an index compares the data of a finished shard with the hash that the shard carries.
"""

from __future__ import annotations

import inspect
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, ParamSpec

from torch import nn
from tqdm import tqdm

from gradsketch.attribution.checkpoints import Checkpoint, as_checkpoints, weights_of
from gradsketch.attribution.description import Description, StoredCheckpoint, comparable_facts
from gradsketch.attribution.engine import Engine, Local
from gradsketch.attribution.examples import as_examples
from gradsketch.attribution.gradients import GradientSource
from gradsketch.attribution.index import AUDITS, Index
from gradsketch.attribution.metric import MetricLike, as_metric, coordinates_for, made_factors, require_of, timed_like
from gradsketch.attribution.parts import BadRow, PartReader, Sample, refuse_bad_rows, sample
from gradsketch.attribution.plan import Plan, bytes_free, size_text
from gradsketch.attribution.writer import ShardWriter
from gradsketch.durable import record_text
from gradsketch.errors import DamageError, GradsketchWarning, InputError, StoreError
from gradsketch.fsdp import Ranks, require_whole
from gradsketch.gradients.factors.factors import Factors
from gradsketch.gradients.fingerprints import settings_of
from gradsketch.gradients.parameters import Selection, bare, selected
from gradsketch.gradients.per_example.audit import Audits
from gradsketch.gradients.tasks import TaskLike, as_task
from gradsketch.sketches.block_sum import BlockSum
from gradsketch.store import Manifest, Store, default_shard_rows
from gradsketch.store.encoding import row_bytes
from gradsketch.store.folder import Folder, LocalFolder, open_folder
from gradsketch.store.manifest import MANIFEST_NAME
from gradsketch.table import printable

__all__ = ["Build", "build_index"]

Arguments = ParamSpec("Arguments")

# A metric is estimated from so many stretches of 32 rows, spread over the data.
_FACTOR_STRETCHES = 32
# The estimate of a run's time comes from so many rows, or from fewer that take so long.
_TIMED_ROWS, _TIMED_SECONDS = 32, 0.5
_BYTES_BESIDE_SKETCH = 64  # id, scale, norm, loss and Arrow's bookkeeping
_TEXT_BYTES_A_TOKEN = 5
_TOLD = 5


class Build:
    """A run of :func:`build_index`: ``plan()`` says what it will do, ``run()`` does it.

    Its signature is that of ``build_index``, which explains the arguments.
    """

    def __init__(
        self,
        path: str | Path,
        model: nn.Module,
        task: TaskLike,
        data: Any,
        *,
        d: int = 4096,
        parameters: Selection = None,
        seed: int = 0,
        dtype: str = "float16",
        checkpoints: Sequence[Any] | Mapping[str, Any] | None = None,
        weights: Sequence[float] | None = None,
        precondition: MetricLike = None,
        shard_rows: int | None = None,
        batch_tokens: int = 4096,
        skip_bad: bool = False,
        worker: tuple[int, int] | None = None,
        engine: Engine | None = None,
        progress: bool | None = None,
    ) -> None:
        # What a worker elsewhere makes the same build of.
        self.arguments = {n: v for n, v in locals().items() if n not in ("self", "worker", "engine", "progress")}
        self.engine = Local() if engine is None else engine
        model = bare(model)
        self.ranks = self._ranks(model, checkpoints)
        worker = self.ranks.place if worker is None else worker
        if not (worker[1] >= 1 and 0 <= worker[0] < worker[1]):
            raise InputError(f"worker={worker}", "(i, n) with 0 ≤ i < n", "Pass worker=(0, 2) and worker=(1, 2)")
        self.worker, speaks = worker, sys.stderr.isatty() and self.ranks.speaks
        self.progress = speaks if progress is None else progress
        self.folder, self.model, self.task = open_folder(path), model, as_task(task)
        self.checkpoints = as_checkpoints(checkpoints, weights)
        self.metric = as_metric(precondition, len(self.checkpoints))
        self.sketch = BlockSum(selected(model, parameters), d, seed=seed, coordinates=coordinates_for(self.metric.name))
        self._seen: dict[str, str] = {}  # the checkpoint that has these weights
        self.batch_tokens, self.skip_bad = batch_tokens, skip_bad
        self.examples = as_examples(data)
        self._told = 0
        self.parts = PartReader(
            self.examples, self.task, model, skip_bad=skip_bad, keep=len(self.checkpoints) > 1, tell=self._tell
        )
        rows = len(self.examples)
        self.shape = Manifest(
            d=d,
            rows=rows,
            shard_rows=default_shard_rows(rows, d, dtype) if shard_rows is None else shard_rows,
            dtype=dtype,
        )
        source = str(data) if isinstance(data, str | Path) else str(getattr(data, "path", type(data).__name__))
        stored = tuple(StoredCheckpoint.of(c, i) for i, c in enumerate(self.checkpoints))
        settings = settings_of(model)
        self.description = Description(d, seed, self.sketch.names, stored, source, self.metric.name, settings)

    def _ranks(self, model: nn.Module, checkpoints: Any) -> Ranks:
        """Return the ranks that hold parts of the model and go in step, through one checkpoint."""
        if checkpoints is not None:
            require_whole(model, "checkpoints", "Build an index at each, or load the model in one piece")
        if not isinstance(self.engine, Local):
            require_whole(model, f"engine={self.engine}", "Start it with torchrun, without an engine")
        return Ranks(model)

    def plan(self, *, timed: bool = True) -> Plan:
        """Return what the run will do, estimated from rows spread over the data; ``timed`` says how long, too."""
        return self._plan(self._rows_missing(), timed)

    def _plan(self, missing: int, timed: bool) -> Plan:
        found = sample(self.examples, self.task, self.model)
        timed = timed and missing > 0 and bool(found.encoded) and not self.ranks.several
        sketch = self.sketch if self.description.precondition is None else timed_like(self.sketch)
        source = GradientSource(self.model, self.task, sketch, batch_tokens=self.batch_tokens, skip_bad=True)
        row_bytes = self._row_bytes() + _TEXT_BYTES_A_TOKEN * found.tokens_a_row
        return Plan(
            path=self.folder.uri,
            rows=self.shape.rows,
            missing=missing,
            sampled=found.read,
            bad=found.bad,
            tokens=round(found.tokens_a_row * self.shape.rows * (1 - len(found.bad) / max(1, found.read))),
            d=self.shape.d,
            n=self.sketch.n,
            tensors=len(self.sketch.names),
            dtype=self.shape.dtype,
            checkpoints=len(self.checkpoints),
            shard_rows=self.shape.shard_rows,
            bytes=round(missing * row_bytes),
            bytes_free=self._bytes_free(),
            seconds=_seconds_a_row(source, found) * missing if timed else None,
            slow=source.sketcher.slow,
            audits=source.sketcher.audits if timed else None,
        )

    def run(self, accepted: Callable[[], Any] = lambda: None) -> Index:
        """Write every shard that is missing or damaged, and return the index.

        ``accepted`` is called once what lies in the folder is known to be of this very work, before anything long.
        """
        with self.ranks.team.together():
            self._run(accepted)
        return Index(self.folder, self.description, self.task, self.checkpoints)

    def _run(self, accepted: Callable[[], Any]) -> None:
        for start, count in self._missing(self.description.checkpoints[0].folder)[:1]:
            self.parts.read(start, count)  # data that cannot be used leaves no folder behind
        self._require_own_factors()  # before there is a folder
        self._create()
        missing = self._rows_missing()
        self._require_space(missing)
        if self.progress:
            print(self._plan(missing, timed=True), file=sys.stderr)
        with tqdm(total=missing, unit="ex", disable=not self.progress, desc=f"d={self.shape.d}", smoothing=0.1) as bar:
            for number in range(len(self.checkpoints)):
                with self.writer(number) as writer:
                    if number == 0:
                        accepted()
                    ranges = writer.unfinished(self._own(self.shape.shard_ranges()))
                    self.engine.write(self, number, writer, ranges, bar.update)
                    writer.keep_up()

    def _require_own_factors(self) -> None:
        for checkpoint, given in zip(
            self.checkpoints, self.metric.given, strict=False
        ):  # none where they are estimated
            with weights_of(self.model, checkpoint):
                require_of(self.model, given, checkpoint.name)

    def _tell(self, row: BadRow) -> None:
        """Say of the first few bad rows, as they are met, that they are left out; the index counts all of them."""
        self._told += 1
        if self.progress and self._told <= _TOLD:
            tqdm.write(printable(f"left out: {row.where}: {row.reason}"), file=sys.stderr)

    def _rows_missing(self) -> int:
        return sum(count for c in self.description.checkpoints for _, count in self._missing(c.folder))

    def _row_bytes(self) -> int:
        return row_bytes(self.shape.d, self.shape.dtype) + _BYTES_BESIDE_SKETCH

    def _require_space(self, missing: int) -> None:
        free, wanted = self._bytes_free(), missing * self._row_bytes()
        if free is not None and wanted > free:
            raise StoreError(
                f"{size_text(free)} free where {self.folder.uri} lies",
                f"{size_text(wanted)} for {missing:,} rows of d = {self.shape.d} in {self.shape.dtype}",
                "Free some space, or pass a smaller d or dtype",
            )

    def _bytes_free(self) -> int | None:
        return bytes_free(self.folder.path) if isinstance(self.folder, LocalFolder) else None

    def _create(self) -> None:
        text = self.description.to_json().encode()
        # What is there is read first, because a finished index may lie where nothing can be written.
        if self.folder.has(MANIFEST_NAME) or not self.folder.write(MANIFEST_NAME, text, replace=False):
            try:
                self.description.require_same(Description.read(self.folder), self.folder.uri)
            except DamageError:
                if not any(self._has_rows(c.folder) for c in self.description.checkpoints):
                    raise  # nothing says that the file is this index's
                self.folder.write(MANIFEST_NAME, text)

    def _has_rows(self, folder: str) -> bool:
        child = self.folder.child(folder)
        return child.has(MANIFEST_NAME) and bool(self._opened(child).ranges())

    @contextmanager
    def writer(self, number: int) -> Iterator[ShardWriter]:
        """Yield what writes the shards of a checkpoint, whose weights the model has meanwhile.

        Raises:
            FingerprintError: there is an index made of something else; it is left alone.
        """
        checkpoint, folder = self.checkpoints[number], self.description.checkpoints[number].folder
        self.ranks.team.meet(number)  # before weights are gathered to be hashed
        with weights_of(self.model, checkpoint):
            factors = self._factors(folder, number)
            sketch = self.sketch if factors is None else factors.before(self.sketch)
            store = Store.create(self.folder.child(folder), self._manifest(checkpoint, factors))
            source = GradientSource(
                self.model, self.task, sketch, batch_tokens=self.batch_tokens, skip_bad=self.skip_bad
            )
            yield ShardWriter(store, self.parts, source, with_metadata=number == 0)

    def _factors(self, folder: str, number: int) -> Factors | None:
        """Return the factors of the checkpoint whose weights the model has now, estimated where there are none yet."""
        metric = self.metric.name
        if metric is None:
            return None

        def rows() -> list[Any]:
            found = sample(self.examples, self.task, self.model, stretches=_FACTOR_STRETCHES)
            if not self.skip_bad:
                refuse_bad_rows(found.bad, found.read)
            return list(found.encoded)

        with tqdm(unit="ex", disable=not self.progress, desc=metric) as bar:
            return made_factors(
                self.folder,
                folder,
                metric,
                self.model,
                self.task,
                self.sketch,
                rows,
                given=self.metric.given[number] if self.metric.given else None,
                batch_tokens=self.batch_tokens,
                advance=bar.update,
            )

    def note(self, audits: Audits, number: int) -> None:
        """Keep beside the rows how often their gradients were held against autograd's own."""
        if self.ranks.team.rank > 0:
            return
        checkpoint = self.description.checkpoints[number].folder
        name = f"{AUDITS}{checkpoint}-{self.worker[0]}-of-{self.worker[1]}.json"
        self.folder.write(name, record_text(asdict(audits)).encode())

    def _manifest(self, checkpoint: Checkpoint, factors: Factors | None) -> Manifest:
        facts = comparable_facts(self.model, self.task, self.sketch, self.description, factors)
        self._compare(checkpoint.name, facts["model"]["weights"])
        return replace(self.shape, facts={**facts, "data": {"rows": self.shape.rows, "ends": self.parts.ends}})

    def _compare(self, name: str, weights: str) -> None:
        """Say where two checkpoints hold the same numbers, because they then count twice."""
        other = self._seen.setdefault(weights, name)
        if other != name:
            warnings.warn(
                f"checkpoints {other!r} and {name!r} hold the same weights, so that their scores count twice",
                GradsketchWarning,
                stacklevel=5,
            )

    def _missing(self, folder: str) -> list[tuple[int, int]]:
        """Return the ranges still to be written, of a store whose shape is that of this run."""
        child = self.folder.child(folder)
        if not child.has(MANIFEST_NAME):
            return list(self._own(self.shape.shard_ranges()))
        try:
            return list(self._own(self._opened(child).unfinished()))
        except DamageError:  # of its index.json, which the run makes anew
            return list(self._own(self.shape.shard_ranges()))

    def _opened(self, folder: Folder) -> Store:
        """Open a store, whose shape must be that of this run."""
        store = Store.open(folder)
        replace(self.shape, facts=store.manifest.facts).require_same(store.manifest, folder.uri)
        return store

    def _own(self, ranges: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
        """Yield the shards that are this worker's to write."""
        number, workers = self.worker
        return (r for r in ranges if r[0] // self.shape.shard_rows % workers == number)


def _seconds_a_row(source: GradientSource, found: Sample) -> float:
    """Time the gradients of a few rows of a sample, more of them while that takes next to no time."""
    count, rows = 2, len(found.encoded)
    while True:
        places = range(0, rows, max(1, -(-rows // count)))
        lengths = [found.lengths[place] for place in places]
        began = time.perf_counter()
        source([found.encoded[place] for place in places], lengths)
        seconds = time.perf_counter() - began
        if (seconds > _TIMED_SECONDS and count > 2) or count >= min(rows, _TIMED_ROWS):
            return seconds * found.tokens_a_row / max(1, sum(lengths))
        count *= 4


def _with_signature_of(
    build: Callable[Arguments, Build],
) -> Callable[[Callable[..., Index]], Callable[Arguments, Index]]:
    """Give a function the signature of another, for the type checker and for ``help``."""

    def signed(function: Callable[..., Index]) -> Callable[Arguments, Index]:
        function.__signature__ = inspect.signature(build).replace(return_annotation="Index")  # type: ignore[attr-defined]
        return function

    return signed


@_with_signature_of(Build)
def build_index(*arguments: Any, **options: Any) -> Index:
    """Sketch the gradient of every training example and store it; run again to go on after an interruption.

    The model is used in evaluation mode and left as it was. Rows are written in shards that are whole and flushed to
    disk or not there, so that the run may be killed at any moment; several processes may work at one index.

    Args:
        path: folder of the index, or a URI such as ``s3://bucket/facts``.
        model: any module, with the weights the training ended with.
        task: what the loss is; a Task, or a function (model, batch) → losses [b].
        data: a path (JSON lines, JSON, CSV, Parquet, text, a folder of texts), a list or dataset of examples, or a dict
            of tensors.
        d: numbers kept of every gradient.
        parameters: the selection, or globs of names; by default all that are trainable.
        seed: of the sketch.
        dtype: of stored numbers: float16, bfloat16, float32, int8, int4 or sign.
        checkpoints: state dicts, or paths of them, whose scores are added up (TracIn); by default the model as it is.
        weights: one a checkpoint, such as its learning rate; by default equal, adding up to one.
        precondition: None (default), or the metric in which gradients are sketched: "kfac" (see :func:`kfac`), with
            factors estimated first from 1,024 rows spread over the data, at each checkpoint, with labels drawn from the
            model; "ekfac" corrects them by a second pass, and "empirical-kfac" takes the labels of the data, for losses
            that are no log-probability. Or factors that were made before, one for each checkpoint. Questions are
            sketched in the same metric.
        shard_rows: rows a shard; by default 16 MB, or a twentieth of the run.
        batch_tokens: tokens a batch, padding included; halved where memory runs out.
        skip_bad: leave out rows that cannot be used, instead of stopping.
        worker: (i, n): of n processes that run this at once, this is the i-th and takes every n-th shard. Ranks that
            share out a model by FSDP2 are such processes by default, and go in step. Those over which tensor
            parallelism splits its layers are one process, whose first rank writes.
        engine: who writes the shards: by default this process; ``gs.Ray(...)`` for the workers of a Ray cluster.
        progress: whether to say what is planned and show a bar; by default in a terminal.

    Example:
        >>> model, task = torch.nn.Linear(20, 2), gs.Classification()
        >>> data = [(torch.randn(20), i % 2) for i in range(32)]
        >>> index = gs.build_index("runs/toy", model, task, data, d=32, progress=False)
        >>> hits = index.query(model, data[:2], k=3)
        >>> hits.to_html("why.html")
        PosixPath('why.html')

    Raises:
        InputError: data that cannot be used, with the place of each bad row.
        FingerprintError: there is an index made of something else, which is left alone; or factors of other weights.
        NonFiniteError: a loss or gradient is not finite.
        StoreError: no room, no permission.
    """
    return Build(*arguments, **options).run()
