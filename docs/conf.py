"""Sphinx configuration."""

from importlib.util import find_spec

from sphinx.application import Sphinx

project = "gradsketch"
copyright = "2026, the gradsketch authors"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax"]
html_theme = "furo"
exclude_patterns = ["_build"]
autodoc_typehints = "none"


def setup(app: Sphinx) -> None:
    if find_spec("jax") is None:  # the docstrings of gradsketch.jax can be read only where JAX is
        app.connect("source-read", _leave_out_jax)


def _leave_out_jax(app: Sphinx, page: str, source: list[str]) -> None:
    if page == "reference":
        source[0], _, _ = source[0].partition("## In JAX\n")
