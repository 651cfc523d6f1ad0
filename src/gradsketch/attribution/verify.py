"""Read every byte of an index: its checkpoints' stores, and the files beside them."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

from gradsketch.attribution.description import Description
from gradsketch.attribution.index import AUDITS
from gradsketch.attribution.metric import read_factors
from gradsketch.attribution.moments import damaged_moments
from gradsketch.durable import record_of
from gradsketch.errors import DamageError, StoreError
from gradsketch.store import Store, Verification, verify
from gradsketch.store.folder import Folder
from gradsketch.table import printable

__all__ = ["IndexVerification", "verify_index"]


@dataclass(frozen=True)
class IndexVerification:
    """What verifying an index found: in the store of each checkpoint, and the damaged files beside them, with reasons.

    Of the files beside, scores depend on the factors of a metric only; the others are derived, or for information.
    """

    stores: tuple[Verification, ...]
    beside: tuple[str, ...]

    @property
    def sound(self) -> bool:
        """Whether everything is there, and every byte is as written."""
        return all(found.sound for found in self.stores) and not self.beside

    def __str__(self) -> str:
        return "\n".join([*map(str, self.stores), *map(printable, self.beside), *(["NOT SOUND"] * bool(self.beside))])


def verify_index(folder: Folder, *beside: str) -> IndexVerification:
    """Check every file of an index against its checksums; ``beside`` names records that others keep in its folder.

    Raises:
        StoreError: an ``index.json`` is missing or damaged, so that nothing can be said of the rest.
    """
    description = Description.read(folder)
    stores = [Store.open(folder.child(checkpoint.folder)) for checkpoint in description.checkpoints]
    moments = [f"{file} is damaged: delete it" for store in stores for file in damaged_moments(store)]
    return IndexVerification(
        tuple(map(verify, stores)), (*_damaged_records(folder, beside), *_lost_factors(folder, description), *moments)
    )


def _lost_factors(folder: Folder, description: Description) -> Iterator[str]:
    for checkpoint in description.checkpoints if description.precondition is not None else ():
        try:
            read_factors(folder, checkpoint.folder)
        except StoreError as error:
            yield str(error)


def _damaged_records(folder: Folder, beside: Collection[str]) -> Iterator[str]:
    for name in folder.names():
        if name in beside or name.startswith(AUDITS):
            try:
                record_of(folder.read(name).to_pybytes(), f"{folder.uri}/{name}")
            except DamageError as error:
                yield str(error)
