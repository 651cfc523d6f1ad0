"""Whether long work shows a bar."""

__all__ = ["hidden"]


def hidden(progress: bool | None, rank: int = 0) -> bool | None:
    """Return what tqdm calls ``disable`` for an argument ``progress``: None shows a bar in a terminal only.

    Of several ranks the first one shows it.
    """
    if rank > 0:
        return True
    return None if progress is None else not progress
