"""The shards of one checkpoint: read a part of the data, sketch its gradients, write them whole."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from gradsketch.attribution.examples import where
from gradsketch.attribution.gradients import GradientSource
from gradsketch.attribution.parts import PartReader, read_part
from gradsketch.attribution.stored_losses import first_apart, losses_of
from gradsketch.errors import FingerprintError, InputError
from gradsketch.gradients.curvature.state import content_of
from gradsketch.gradients.data import is_out_of_memory
from gradsketch.gradients.per_example.audit import Audits, tolerance
from gradsketch.store import Rows, Store

__all__ = ["ShardWriter"]

_COMPARED = 8  # rows of a finished shard


class ShardWriter:
    """Writes shards of one checkpoint's store; with ``with_metadata`` also what the data says of each row."""

    def __init__(self, store: Store, parts: PartReader, source: GradientSource, *, with_metadata: bool) -> None:
        self.store, self.parts, self.source, self.with_metadata = store, parts, source, with_metadata
        self._weights = self._weights_now()

    @property
    def audits(self) -> Audits:
        """How often gradients were held against autograd's own, and the largest error."""
        return self.source.sketcher.audits

    def unfinished(self, ranges: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
        """Yield those of the ranges, in order, whose shards are missing or damaged; compare the data of the others.

        Raises:
            FingerprintError: a finished shard was made of other data, or by a model that computes something else.
        """
        unfinished, ranks, every = set(self.store.unfinished()), self.source.sketcher.ranks, list(ranges)
        missing = [each for each in every if ranks.team.any(each in unfinished)]
        for start, count in sorted({*every} - {*missing}):  # before anything is written
            self._require_same_data(start, count)
        if not ranks.several:
            self._require_same_losses(each for each in self.store.ranges() if each not in unfinished)
        yield from missing

    def write(self, start: int, count: int, advance: Callable[[int], Any] = lambda count: None) -> None:
        """Write one shard, unless another process did so meanwhile; ``advance`` hears of every row done.

        Raises:
            FingerprintError: the weights are others than when the index was begun.
            InputError: rows that cannot be used.
            NonFiniteError: a loss or gradient is not finite.
            StoreError: no room, no permission.
        """
        team = self.source.sketcher.ranks.team
        if team.all(self.store.is_sound(start, count)):
            advance(count)
            return
        try:
            with team.together():  # others wait until the shard is there
                rows = self._rows(start, count, advance)
                self._require_same_weights(start, count)
                if team.rank == 0:
                    self.store.write(start, rows)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise InputError(
                f"a shard of {count} rows of d = {self.store.d} does not fit into memory",
                "one that does, while its rows are made",
                "Pass a smaller shard_rows, or a smaller d",
            ) from error

    def keep_up(self) -> None:
        """Go in step with the other ranks of a sharded model until all have written their shards."""
        if self.source.sketcher.ranks.several:
            self.source.keep_up(self.parts.read(0, min(self.store.rows, self.store.manifest.shard_rows)).encoded[0])

    def _rows(self, start: int, count: int, advance: Callable[[int], Any]) -> Rows:
        part = self.parts.read(start, count)
        sketched = self.source(part.encoded, part.lengths, advance, lambda i: self._where(part.places[i]))
        advance(len(part.bad))
        sketches = torch.zeros(count, self.store.d, dtype=torch.float32, device="cpu")
        losses = sketches.new_full((count,), torch.nan)
        positions = [place - start for place in part.places]
        sketches[positions], losses[positions] = sketched.sketches, sketched.losses
        left_out = {row.place - start: f"{row.where}: {row.reason}" for row in part.bad}
        left_out |= {positions[i]: f"{self._where(part.places[i])}: {why}" for i, why in sketched.skipped.items()}
        tokens = torch.full((count,), torch.nan, dtype=torch.float32, device="cpu")
        tokens[positions] = torch.tensor(part.lengths, dtype=torch.float32, device="cpu")
        columns = part.columns if self.with_metadata else {}
        return Rows(part.ids, sketches, losses, columns, left_out, part.digest, tokens)

    def _where(self, place: int) -> str:
        return where(self.parts.examples, place)

    def _weights_now(self) -> Any:
        """Return what tells weights apart, read in one pass; ranks that hold parts would have to meet for it."""
        sketcher = self.source.sketcher
        return None if sketcher.ranks.several else content_of(dict(sketcher.model.named_parameters()))

    def _require_same_weights(self, start: int, count: int) -> None:
        """Refuse rows that were made while something trained the model, before they are written."""
        if self._weights_now() != self._weights:
            raise FingerprintError(
                f"weights that changed while rows {start} to {start + count - 1} were sketched",
                f"those that {self.store.folder.uri} was begun with",
                "Index a copy of a model that is being trained: copy.deepcopy(model)",
            )

    def _require_same_losses(self, finished: Iterable[tuple[int, int]]) -> None:
        """Hold a few rows' losses against the stored ones: they tell what no tensor does, as an adapter's scale."""
        model, task = self.source.model, self.parts.task
        for start, count in finished:
            part = read_part(self.parts.examples, start, min(count, _COMPARED), task, model)
            losses = losses_of(model, task, part.encoded)
            if (apart := first_apart(losses, self.store, part.places, alike=self._allowed)) is not None:
                row, now, then = apart
                raise FingerprintError(
                    f"a loss of {now:.4g} of {self._where(row)}",
                    f"{then:.4g}, with which it stands in {self.store.folder.uri}",
                    "Set the model as it was then (adapters and their scales, temperature), or choose another path",
                )
            if part.places:
                return

    @property
    def _allowed(self) -> float:
        """By how much a loss may differ in other company or on another device: in half precision, by a twentieth."""
        dtypes = {t.dtype for t in self.source.sketcher.model.parameters() if t.is_floating_point()}
        return min(0.05, 10 * max(map(tolerance, dtypes)))

    def _require_same_data(self, start: int, count: int) -> None:
        if self.store.shard(start, count).digest != self.parts.digest(start, count):
            last = start + count - 1
            raise FingerprintError(
                f"{self.store.folder.uri} was made of other data: rows {start} to {last} differ "
                f"({self._where(start)} to {self._where(last)})",
                "the data that the index was begun with",
                "Restore that data, or build an index of this data in another folder",
            )
