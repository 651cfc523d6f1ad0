"""Build an index: one pass over the training data, resumable at any moment, by any number of processes at once."""

from __future__ import annotations

import inspect
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, ParamSpec

from torch import nn
from tqdm import tqdm

from gradsketch.attribution.checkpoints import Checkpoint, as_checkpoints, weights_of
from gradsketch.attribution.description import Description, StoredCheckpoint, comparable_facts
from gradsketch.attribution.examples import as_examples, fields, refuse_bad_rows, survey, where
from gradsketch.attribution.gradients import GradientSource
from gradsketch.attribution.index import AUDITS, Index
from gradsketch.attribution.plan import Plan, bytes_free, size_text
from gradsketch.durable import record_text
from gradsketch.errors import DamageError, GradsketchWarning, InputError, StoreError
from gradsketch.gradients.data import is_out_of_memory
from gradsketch.gradients.parameters import Selection, selected
from gradsketch.gradients.per_example.audit import Audits
from gradsketch.gradients.tasks import TaskLike, as_task
from gradsketch.sketches.block_sum import BlockSum
from gradsketch.store import Manifest, Rows, Store, default_shard_rows
from gradsketch.store.encoding import bytes_per_entry
from gradsketch.store.folder import Folder, LocalFolder, open_folder
from gradsketch.store.manifest import MANIFEST_NAME

__all__ = ["Build", "build_index"]

Arguments = ParamSpec("Arguments")

# The estimate of a run's time comes from so many rows, or from fewer that take so long.
_TIMED_ROWS, _TIMED_SECONDS = 32, 0.5
_BYTES_BESIDE_SKETCH = 64  # id, scale, norm, loss and Arrow's bookkeeping


class Build:
    """A run of :func:`build_index` whose data has been surveyed: ``plan()`` says what it will do, ``run()`` does it.

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
        shard_rows: int | None = None,
        batch_tokens: int = 4096,
        skip_bad: bool = False,
        worker: tuple[int, int] = (0, 1),
        progress: bool | None = None,
    ) -> None:
        if not (worker[1] >= 1 and 0 <= worker[0] < worker[1]):
            raise InputError(f"worker={worker}", "(i, n) with 0 ≤ i < n", "Pass worker=(0, 2) and worker=(1, 2)")
        self.worker, self.progress = worker, sys.stderr.isatty() if progress is None else progress
        self.folder, self.model, self.task = open_folder(path), model, as_task(task)
        self.sketch = BlockSum(selected(model, parameters), d, seed=seed)
        self.checkpoints = as_checkpoints(checkpoints, weights)
        self._seen: dict[str, str] = {}  # the checkpoint that has these weights
        self.batch_tokens, self.skip_bad = batch_tokens, skip_bad
        self.examples = as_examples(data)
        self.survey = survey(self.examples, self.task, model)
        if not skip_bad or not self.survey.places:
            refuse_bad_rows(self.survey.bad, len(self.examples))
        rows = len(self.survey.places)
        self.shape = Manifest(
            d=d,
            rows=rows,
            shard_rows=default_shard_rows(rows, d, dtype) if shard_rows is None else shard_rows,
            dtype=dtype,
            columns=self.survey.columns,
        )
        source = str(data) if isinstance(data, str | Path) else str(getattr(data, "path", type(data).__name__))
        stored = tuple(StoredCheckpoint.of(c, i) for i, c in enumerate(self.checkpoints))
        self.description = Description(d, seed, self.sketch.names, stored, source)

    def plan(self, *, timed: bool = True) -> Plan:
        """Return what the run will do; with ``timed``, the gradients of a few examples are timed to estimate it."""
        missing = sum(count for c in self.description.checkpoints for _, count in self._missing(c.folder))
        timed = timed and missing > 0
        source = GradientSource(self.model, self.task, self.sketch, batch_tokens=self.batch_tokens, skip_bad=True)
        seconds = self._seconds_a_row(source) * missing if timed else None
        row_bytes = self.shape.d * bytes_per_entry(self.shape.dtype) + _BYTES_BESIDE_SKETCH + 5 * self._tokens_a_row
        return Plan(
            path=self.folder.uri,
            rows=self.shape.rows,
            missing=missing,
            bad=self.survey.bad,
            tokens=self.survey.tokens,
            d=self.shape.d,
            n=self.sketch.n,
            tensors=len(self.sketch.names),
            dtype=self.shape.dtype,
            checkpoints=len(self.checkpoints),
            shard_rows=self.shape.shard_rows,
            bytes=round(missing * row_bytes),
            bytes_free=bytes_free(self.folder.path) if isinstance(self.folder, LocalFolder) else None,
            seconds=seconds,
            slow=source.sketcher.slow,
            audits=source.sketcher.audits if timed else None,
        )

    def run(self, accepted: Callable[[], Any] = lambda: None) -> Index:
        """Write every shard that is missing or damaged, and return the index.

        ``accepted`` is called once what lies in the folder is known to be of this very work, before anything long.
        """
        self._create()
        plan = self.plan(timed=self.progress)
        if plan.bytes_free is not None and plan.bytes > plan.bytes_free:
            raise StoreError(
                f"{size_text(plan.bytes_free)} free where {self.folder.uri} lies",
                f"{size_text(plan.bytes)} for {plan.missing:,} rows of d = {plan.d} in {plan.dtype}",
                "Free some space, or pass a smaller d or dtype",
            )
        if self.progress:
            print(plan, file=sys.stderr)
        with tqdm(total=plan.missing, unit="ex", disable=not self.progress, desc=f"d={plan.d}", smoothing=0.1) as bar:
            for number, checkpoint in enumerate(self.checkpoints):
                self._index(checkpoint, number, accepted, bar)
        return Index(self.folder, self.description, self.task, self.checkpoints)

    def _create(self) -> None:
        text = self.description.to_json().encode()
        # What is there is read first, because a finished index may lie where nothing can be written.
        if MANIFEST_NAME in self.folder.names() or not self.folder.write(MANIFEST_NAME, text, replace=False):
            try:
                self.description.require_same(Description.read(self.folder), self.folder.uri)
            except DamageError:
                if not any(self._has_rows(c.folder) for c in self.description.checkpoints):
                    raise  # nothing says that the file is this index's
                self.folder.write(MANIFEST_NAME, text)

    def _has_rows(self, folder: str) -> bool:
        child = self.folder.child(folder)
        return MANIFEST_NAME in child.names() and bool(self._opened(child).ranges())

    def _index(self, checkpoint: Checkpoint, number: int, accepted: Callable[[], Any], bar: Any) -> None:
        folder = self.description.checkpoints[number].folder
        with weights_of(self.model, checkpoint):
            store = Store.create(self.folder.child(folder), self._manifest(checkpoint, number == 0))
            if number == 0:
                accepted()
            source = GradientSource(
                self.model, self.task, self.sketch, batch_tokens=self.batch_tokens, skip_bad=self.skip_bad
            )
            for start, count in self._own(store.unfinished()):
                if (start, count) in store.ranges() and store.is_sound(start, count):  # another process was faster
                    bar.update(count)
                    continue
                self._write(store, source, start, number == 0, bar)
                self._note(source.sketcher.audits, folder)

    def _write(self, store: Store, source: GradientSource, start: int, with_metadata: bool, bar: Any) -> None:
        _, count = store.manifest.shard_at(start)
        try:
            store.write(start, self._rows(source, start, count, with_metadata, bar))
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise InputError(
                f"a shard of {count} rows of d = {self.shape.d} does not fit into memory",
                "one that does, while its rows are made",
                "Pass a smaller shard_rows, or a smaller d",
            ) from error

    def _note(self, audits: Audits, checkpoint: str) -> None:
        """Keep beside the rows how often their gradients were held against autograd's own."""
        name = f"{AUDITS}{checkpoint}-{self.worker[0]}-of-{self.worker[1]}.json"
        self.folder.write(name, record_text(asdict(audits)).encode())

    def _manifest(self, checkpoint: Checkpoint, first: bool) -> Manifest:
        """Return a checkpoint's manifest; metadata stands in the first checkpoint's store only."""
        data = {"rows": self.shape.rows, "hash": self.survey.digest}
        facts = {**comparable_facts(self.model, self.task, self.sketch), "data": data}
        self._compare(checkpoint.name, facts["model"]["weights"])
        return replace(self.shape, columns=self.shape.columns if first else {}, facts=facts)

    def _compare(self, name: str, weights: str) -> None:
        """Say where two checkpoints hold the same numbers, because they then count twice."""
        other = self._seen.setdefault(weights, name)
        if other != name:
            warnings.warn(
                f"checkpoints {other!r} and {name!r} hold the same weights, so that their scores count twice",
                GradsketchWarning,
                stacklevel=5,
            )

    def _rows(self, source: GradientSource, start: int, count: int, with_metadata: bool, bar: Any) -> Rows:
        places, lengths = self._places(slice(start, start + count))
        examples = [self.examples[place] for place in places]
        encoded = self._encoded(places, examples)
        sketched = source(encoded, lengths, bar.update, lambda i: where(self.examples, places[i]))
        described = [fields(example) for example in examples]
        ids = [id_ if id_ is not None else str(place) for place, (id_, _) in zip(places, described, strict=True)]
        names = self.shape.columns if with_metadata else {}
        columns = {name: [columns.get(name) for _, columns in described] for name in names}
        return Rows(ids, sketched.sketches, sketched.losses, columns)

    def _places(self, rows: slice) -> tuple[Sequence[int], Sequence[int]]:
        """Return the places of rows in the data, and their lengths."""
        return self.survey.places[rows], self.survey.lengths[rows]

    def _encoded(self, places: Sequence[int], examples: Sequence[Any]) -> list[Any]:
        """Return the rows that the survey encoded, and the examples themselves where it kept none."""
        return [self.survey.encoded.get(place, example) for place, example in zip(places, examples, strict=True)]

    def _missing(self, folder: str) -> list[tuple[int, int]]:
        """Return the ranges still to be written, of a store whose shape is that of this run."""
        child = self.folder.child(folder)
        if MANIFEST_NAME not in child.names():
            return list(self._own(self.shape.shard_ranges()))
        try:
            return list(self._own(self._opened(child).unfinished()))
        except DamageError:  # of its index.json, which the run makes anew
            return list(self._own(self.shape.shard_ranges()))

    def _opened(self, folder: Folder) -> Store:
        """Open a store, whose shape must be that of this run."""
        store = Store.open(folder)
        replace(self.shape, columns=store.manifest.columns, facts=store.manifest.facts).require_same(
            store.manifest, folder.uri
        )
        return store

    def _own(self, ranges: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
        """Yield the shards that are this worker's to write."""
        number, workers = self.worker
        return (r for r in ranges if r[0] // self.shape.shard_rows % workers == number)

    @property
    def _tokens_a_row(self) -> float:
        return self.survey.tokens / max(1, self.shape.rows)

    def _seconds_a_row(self, source: GradientSource) -> float:
        """Time the gradients of a few examples spread over the data, more of them while that takes next to no time."""
        count, rows = 2, self.shape.rows
        while True:
            places, lengths = self._places(slice(0, rows, max(1, -(-rows // count))))
            rows_read = self._encoded(places, [self.examples[place] for place in places])
            began = time.perf_counter()
            source(rows_read, lengths)
            seconds = time.perf_counter() - began
            if (seconds > _TIMED_SECONDS and count > 2) or count >= min(rows, _TIMED_ROWS):
                return seconds * self._tokens_a_row / max(1, sum(lengths))
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
        dtype: of stored numbers: float16, bfloat16, float32 or int8.
        checkpoints: state dicts, or paths of them, whose scores are added up (TracIn); by default the model as it is.
        weights: one a checkpoint, such as its learning rate; by default equal, adding up to one.
        shard_rows: rows a shard; by default 16 MB, or a twentieth of the run.
        batch_tokens: tokens a batch, padding included; halved where memory runs out.
        skip_bad: leave out rows that cannot be used, instead of stopping.
        worker: (i, n): of n processes that run this at once, this is the i-th and takes every n-th shard.
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
        FingerprintError: there is an index made of something else; it is left alone.
        NonFiniteError: a loss or gradient is not finite.
        StoreError: no room, no permission.
    """
    return Build(*arguments, **options).run()
