"""Errors and warnings. Each message says what came, what was wanted and what to type."""

__all__ = [
    "DamageError",
    "FingerprintError",
    "GradsketchError",
    "GradsketchWarning",
    "InputError",
    "NonFiniteError",
    "StoreError",
    "is_said_elsewhere",
    "leave_to_others",
]


class GradsketchError(Exception):
    """Base of every error this library raises on purpose.

    Built from three sentences without their full stops: what came, what was wanted, and what to do about it.
    """

    def __init__(self, came: str, wanted: str, fix: str) -> None:
        super().__init__(came, wanted, fix)
        self.came, self.wanted, self.fix = came, wanted, fix

    def __str__(self) -> str:
        return f"{self.came}. Wanted: {self.wanted}. {self.fix}."


class InputError(GradsketchError, ValueError):
    """An argument has the wrong shape, type, range or kind."""


class NonFiniteError(GradsketchError, ArithmeticError):
    """A NaN or an infinity, with the place where it was found."""


class FingerprintError(GradsketchError):
    """Two things that must have been made alike (sketch, parameters, task, index) were not."""


class StoreError(GradsketchError):
    """A file, or a sketch store, is damaged, incomplete, read-only, or on a full disk."""


class DamageError(StoreError):
    """A file was read, and its bytes are not those that were written: making it again repairs it."""


class GradsketchWarning(UserWarning):
    """A slower or less exact path was taken; the message names it and says how to avoid it."""


_ELSEWHERE = "_gradsketch_said_elsewhere"


def leave_to_others(error: Exception) -> None:
    """Note that another process has raised this error too, and says so."""
    setattr(error, _ELSEWHERE, True)


def is_said_elsewhere(error: Exception) -> bool:
    """Whether another process says this error."""
    return hasattr(error, _ELSEWHERE)
