"""The command line: one small module per command."""

from gradsketch.cli.command import Command
from gradsketch.cli.main import main, register

__all__ = ["Command", "main", "register"]
