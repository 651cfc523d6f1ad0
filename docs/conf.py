"""Sphinx configuration."""

project = "gradsketch"
copyright = "2026, the gradsketch authors"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax"]
html_theme = "furo"
exclude_patterns = ["_build"]
autodoc_typehints = "none"
