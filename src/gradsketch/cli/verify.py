"""gradsketch verify: read every byte of an index and name what is damaged or missing."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import tyro

from gradsketch.cli.command import Command

__all__ = ["COMMAND", "VerifyOptions"]


@dataclass(frozen=True)
class VerifyOptions:
    """Read every byte of an index and name what is damaged or missing: file, column and rows.

    The exit code is 0 where everything is sound and complete, 1 otherwise.
    """

    index: tyro.conf.Positional[str]
    """Folder or URI of the index."""
    json: bool = False
    """Print the findings as JSON."""


def run(options: VerifyOptions) -> int:
    """Print what was found in each checkpoint's store."""
    from gradsketch.attribution.description import Description
    from gradsketch.plain import as_json
    from gradsketch.store import Store, verify
    from gradsketch.store.folder import open_folder

    folder = open_folder(options.index)
    checkpoints = Description.read(folder).checkpoints
    found = [verify(Store.open(folder.child(checkpoint.folder))) for checkpoint in checkpoints]
    if options.json:
        print(as_json([{**asdict(f), "sound": f.sound} for f in found]))
    else:
        print("\n".join(str(f) for f in found))
    return 0 if all(f.sound for f in found) else 1


COMMAND = Command("verify", "read every byte of an index and name what is damaged or missing", VerifyOptions, run)
