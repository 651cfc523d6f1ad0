"""A matplotlib figure becomes a picture on the disk, whole or not at all."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

from gradsketch.durable import write_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["write_figure"]


def write_figure(figure: Figure, path: str | Path) -> Path:
    """Write a figure in the format that the path's ending names (none: PNG), and return the path.

    Raises:
        StoreError: the file cannot be written.
    """
    path, picture = Path(path), io.BytesIO()
    figure.savefig(picture, dpi=150, format=path.suffix[1:] or "png")
    write_file(path, picture.getbuffer())
    return path
