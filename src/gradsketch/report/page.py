"""One HTML file that needs nothing else: style and script inside, no request to anywhere, no script but its own.

Jinja2 escapes. Besides, the content security policy admits nothing but the page's own style and script, by their
hashes, and images that stand in the page. A text that slipped through the escaping could still not run or load
anything.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Any

import jinja2
from markupsafe import Markup

from gradsketch.table import printable

__all__ = ["asset", "render"]


def render(template: str, context: Mapping[str, Any]) -> str:
    """Fill a template; every value is escaped, and made printable where it is not.

    The page's content security policy lets in nothing but its own style and script, by their hashes, and images that
    stand in the page itself. So a text that slipped through the escaping still could not run or load anything.
    """
    style, script = asset("page.css"), asset("reading.js") + asset("page.js")
    policy = f"default-src 'none'; style-src {_hash(style)}; script-src {_hash(script)}; img-src data:"
    inline = {"style": Markup(style), "script": Markup(script), "policy": policy}
    return _environment().get_template(template).render(**context, **inline)


def _shown(value: Any) -> Any:
    """Return a text made printable; anything else, and what is markup already, as it is."""
    return value if not isinstance(value, str) or isinstance(value, Markup) else printable(value, lines=True)


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def asset(name: str) -> str:
    """Return the text of a style or script; ``reading.js`` is what every page of texts with colours needs."""
    return (files("gradsketch.report") / "templates" / name).read_text(encoding="utf-8")


@cache
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.PackageLoader("gradsketch.report"),
        autoescape=True,
        finalize=_shown,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
