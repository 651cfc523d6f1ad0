"""An index of gradients that were sketched elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gradsketch.attribution.checkpoints import Checkpoint
from gradsketch.attribution.description import Description, StoredCheckpoint, sketch_facts
from gradsketch.attribution.examples import fields
from gradsketch.attribution.index import Index
from gradsketch.attribution.parts import digest_of
from gradsketch.attribution.queries import as_sketched
from gradsketch.gradients.fingerprints import digest
from gradsketch.sketches.block_sum import BlockSum
from gradsketch.store import Manifest, Rows, Store, default_shard_rows
from gradsketch.store.folder import open_folder
from gradsketch.store.manifest import MANIFEST_NAME

__all__ = ["index_sketches"]


def index_sketches(
    path: str | Path, sketches: Any, losses: Any, examples: Sequence[Any], sketch: BlockSum, *, dtype: str = "float16"
) -> Index:
    """Store gradients that were sketched elsewhere, in JAX for instance; ask with ``Index.query_sketches``.

    Args:
        path: folder of the index.
        sketches: [n, d], an array of any library.
        losses: [n].
        examples: the n rows: texts, (prompt, answer) pairs or dicts; what is text or a number is stored.
        sketch: with which they were made; ``gj.block_sum(...).torch`` of one in JAX.
        dtype: of stored numbers.

    Example:
        >>> model, task = torch.nn.Linear(20, 2), gs.Classification()
        >>> data = [(torch.randn(20), i % 2) for i in range(32)]
        >>> phi = gs.BlockSum(gs.Parameters(model), 16)
        >>> made = gs.GradientSketcher(model, task, phi)(task.collate(data))
        >>> index = gs.index_sketches("runs/ready", made.values, made.losses, data, phi)
        >>> index.query_sketches(made.values[:1], made.losses[:1], data[:1], phi, k=2)[0].proponents[0].row
        0

    Raises:
        InputError: arrays of other shapes.
        FingerprintError: there is an index made of something else; it is left alone.
        NonFiniteError: a sketch or a loss is not finite.
        StoreError: no room, no permission.
    """
    found = as_sketched(sketches, losses, len(examples), sketch.d)
    folder, rows = open_folder(path), len(examples)
    stored = StoredCheckpoint.of(Checkpoint("sketches", None, 1.0), 0)
    description = Description(sketch.d, sketch.seed, sketch.names, (stored,), "sketches")
    if not folder.write(MANIFEST_NAME, description.to_json().encode(), replace=False):
        description.require_same(Description.read(folder), folder.uri)
    content = {
        "rows": rows,
        "content": digest_of(examples, 0, rows),
        "sketches": digest([found.sketches, found.losses]),
    }
    facts = {**sketch_facts(sketch), "data": content}
    shape = Manifest(sketch.d, rows, default_shard_rows(rows, sketch.d, dtype), dtype, facts)
    store = Store.create(folder.child(stored.folder), shape)
    for start, count in store.unfinished():
        some = slice(start, start + count)
        names, columns = _described(examples[some], start)
        store.write(start, Rows(names, found.sketches[some], found.losses[some], columns))
    return Index(folder, description)


def _described(examples: Sequence[Any], start: int) -> tuple[list[str], dict[str, list[Any]]]:
    """Return ids, and metadata by column."""
    described = [fields(example) for example in examples]
    columns = {name: [row.get(name) for _, row in described] for _, row in described for name in row}
    return [str(start + i) if id_ is None else id_ for i, (id_, _) in enumerate(described)], columns
