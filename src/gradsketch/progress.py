"""Whether long work shows a bar."""

__all__ = ["hidden"]


def hidden(progress: bool | None) -> bool | None:
    """Return what tqdm calls ``disable`` for an argument ``progress``: None shows a bar in a terminal only."""
    return None if progress is None else not progress
