"""gradsketch verify: read every byte of an index and name what is damaged or missing."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, replace

import tyro

from gradsketch.cli import index
from gradsketch.cli.command import Command
from gradsketch.cli.work import WorkOptions
from gradsketch.errors import InputError

__all__ = ["COMMAND", "VerifyOptions"]


@dataclass(frozen=True)
class VerifyOptions:
    """Read every byte of an index and name what is damaged or missing: file, column and rows.

    The exit code is 0 where everything is sound and complete, 1 otherwise.
    """

    index: tyro.conf.Positional[str]
    """Folder or URI of the index."""
    repair: bool = False
    """Make damaged and missing rows again, with the options in the index's run.json."""
    json: bool = False
    """Print the findings as JSON."""


def run(options: VerifyOptions) -> int:
    """Print what was found in each checkpoint's store."""
    from gradsketch.attribution.verify import verify_index
    from gradsketch.plain import as_json
    from gradsketch.store.folder import open_folder

    if options.repair:
        _repair(options)
    found = verify_index(open_folder(options.index), index.RUN_FILE)
    if options.json:
        stores = [{**asdict(store), "sound": store.sound} for store in found.stores]
        print(as_json({"sound": found.sound, "stores": stores, "beside": found.beside}))
    else:
        print(found)
    return 0 if found.sound else 1


def _repair(options: VerifyOptions) -> None:
    """Run the command again that built the index: it makes what is damaged or missing."""
    stored = index.built_with(options.index)
    if stored is None:
        raise InputError(
            f"{options.index} without a {index.RUN_FILE}",
            "the options it was built with",
            "Type the index command again",
        )
    with redirect_stdout(sys.stderr):
        index.run(replace(stored, path=options.index, dry_run=False, json=False, work=WorkOptions()))


COMMAND = Command("verify", "read every byte of an index and name what is damaged or missing", VerifyOptions, run)
