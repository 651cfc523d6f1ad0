"""The command line: one small module per command."""

from gradsketch.cli.main import main

__all__ = ["main"]
