"""Check the links of the documentation that stay in this repository: ``python tools/links.py``.

Of every Markdown file it follows links and images to files and folders, their ``#anchors`` to headings, and names of
files in backticks such as ``benchmarks/rerank.py``. Sphinx checks what is between pages only, and never the README.
"""

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

ROOT = Path(__file__).parents[1]
_FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"(?<!`)\[[^\]]*\]\(([^)\s]+)\)|\{doc\}`(?:[^`<]*<)?([^`>]+)>?`")
_NAMED = re.compile(r"`((?:benchmarks|docs|examples|results|src|tests|tools|\.github)/[\w./-]+)[ `]")
_PLACES = ("", "benchmarks/", "src/gradsketch/")  # from which pages name files
_MADE = {"benchmarks/results/gpu.json"}  # by a command that its page names


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub and MyST make them."""
    heads = re.findall(r"^#+ (.+)$", _FENCE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def broken(page: Path, root: Path = ROOT) -> Iterator[str]:
    """Yield what a page points at and is not there."""
    text = _FENCE.sub("", page.read_text(encoding="utf-8"))
    for link, doc in _LINK.findall(text):
        where, _, anchor = unquote(f"{doc}.md" if doc else link).partition("#")
        if re.match(r"\w+:", where):
            continue
        base = root / "docs" if where.startswith("/") else page.parent
        target = base / where.lstrip("/") if where else page
        if not target.exists():
            yield f"{link or doc}: no such file"
        elif anchor and anchor not in anchors(target):
            yield f"{link or doc}: no such heading"
    for name in _NAMED.findall(text):
        if name not in _MADE and not any((root / place / name).exists() for place in _PLACES):
            yield f"`{name}`: no such file"


def main() -> int:
    """Print every broken link with its page, and return 1 where there is one."""
    pages = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
    found = [f"{page.relative_to(ROOT)}: {what}" for page in pages for what in broken(page)]
    print("\n".join(found), file=sys.stderr, end="\n" * bool(found))
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
