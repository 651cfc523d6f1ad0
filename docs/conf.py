"""Sphinx configuration."""

import dataclasses
from importlib.util import find_spec
from typing import Any

from sphinx.application import Sphinx

project = "gradsketch"
copyright = "2026, the gradsketch authors"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax"]
html_theme = "furo"
exclude_patterns = ["_build"]
autodoc_typehints = "none"


def setup(app: Sphinx) -> None:
    app.connect("autodoc-process-docstring", _add_fields, priority=900)  # after napoleon
    if find_spec("jax") is None:  # the docstrings of gradsketch.jax can be read only where JAX is
        app.connect("source-read", _leave_out_jax)


def _leave_out_jax(app: Sphinx, page: str, source: list[str]) -> None:
    if page == "reference":
        source[0], _, _ = source[0].partition("## In JAX\n")


def _add_fields(app: Sphinx, what: str, name: str, record: Any, options: Any, lines: list[str]) -> None:
    """Write the fields of a record below its docstring, with their types as the source has them: shapes included."""
    if what == "class" and dataclasses.is_dataclass(record):
        shown = [f"``{field.name}``: ``{field.type}``" for field in dataclasses.fields(record) if field.init]
        lines += ["", "Fields:", "", *(f"* {text}" for text in shown if not text.startswith("``_")), ""]
