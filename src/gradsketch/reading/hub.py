"""Data sets of the Hugging Face hub, which its own library ``datasets`` loads and keeps on disk."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from gradsketch.errors import InputError
from gradsketch.reading import connection
from gradsketch.reading.memory import DatasetRows
from gradsketch.table import one_line

__all__ = ["HubName", "hub_name", "hub_rows"]

_SCHEME = "hf://"
_NAME = re.compile(
    r"(?:datasets/)?(?P<name>[\w-][\w.-]*(?:/[\w-][\w.-]*)?)(?::(?P<config>[\w.-]+))?(?:@(?P<revision>[^/@]+))?"
)


@dataclass(frozen=True)
class HubName:
    """A data set of the hub: ``owner/name``, with ``:config`` and ``@revision`` where they were given."""

    name: str
    config: str | None
    revision: str | None

    def at(self, revision: str | None) -> HubName:
        """Return the same at a revision.

        Raises:
            InputError: the name holds another one.
        """
        if revision is not None and self.revision not in (None, revision):
            raise InputError(
                f"{self.name} at {self.revision} by its name, and at {revision}", "one revision", "Leave one out"
            )
        return replace(self, revision=revision or self.revision)

    def __str__(self) -> str:
        config, revision = (
            f"{mark}{part}" if part else "" for mark, part in ((":", self.config), ("@", self.revision))
        )
        return f"{_SCHEME}datasets/{self.name}{config}{revision}"


def hub_name(text: str) -> HubName | None:
    """Return what ``owner/name``, ``name:config`` or ``hf://datasets/owner/name@revision`` names, or None.

    A path inside a data set, such as ``hf://datasets/owner/name/data/*.parquet``, is none: it names files.
    """
    found = _NAME.fullmatch(text.removeprefix(_SCHEME))
    return HubName(**found.groupdict()) if found else None


def hub_rows(name: HubName, split: str | None) -> DatasetRows:
    """Load a data set, or take it from the disk where it was loaded before.

    Raises:
        InputError: ``datasets`` is not installed, there is no such data set, revision or split, it has several splits
            and none is named, or the hub cannot be reached and this disk does not have it.
    """
    try:
        import datasets
    except ImportError as error:
        raise InputError(
            f"{name.name!r} is no file or folder here, and {name} takes the package datasets, which is not installed",
            "a file, a folder, or datasets to load it from the hub",
            "Check the path, or type: pip install 'gradsketch[data]'",
        ) from error
    reached = connection.hub_reached()
    with connection.offline(not reached):
        if not reached and name.revision is not None:
            raise _refused(name, "the hub is out of reach, and a revision cannot be checked without it", split)
        where = (name.name, name.config) if name.config else (name.name,)
        if split is None:
            names = _asked(
                name, reached, split, lambda: datasets.get_dataset_split_names(*where, revision=name.revision)
            )
            if len(names) != 1:
                raise InputError(
                    f"{name} has the splits {', '.join(names)}",
                    "one of them",
                    f"Type --split {names[0]}" if names else "",
                )
            split = names[0]
        found = _asked(name, reached, split, lambda: datasets.load_dataset(*where, split=split, revision=name.revision))
    return DatasetRows(f"{name} {split}", found)


def _asked(name: HubName, reached: bool, split: str | None, ask: Callable[[], Any]) -> Any:
    try:
        return ask()
    except Exception as error:  # datasets, its builders and the hub's client have errors of their own
        reason = one_line((str(error).strip() or type(error).__name__).splitlines()[0], 300)
        away = "" if reached else "the hub is out of reach, and this disk does not have it: "
        raise _refused(name, f"{away}{reason}", split) from error


def _refused(name: HubName, reason: str, split: str | None) -> InputError:
    what = f"{name}" + f", split {split}" * (split is not None)
    return InputError(
        f"{what} cannot be loaded ({reason.rstrip('.')})",
        "a file or folder of this machine, or a data set of the hub",
        "Check the name, the split and the connection",
    )
