"""Data as people have it: files, folders, the hub, pipes and tables in memory, all as one sequence of rows."""

from gradsketch.reading.memory import by_position
from gradsketch.reading.open import read_examples
from gradsketch.reading.rows import FileRows

__all__ = ["FileRows", "by_position", "read_examples"]
