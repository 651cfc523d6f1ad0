"""Every number in a table of the README and the documentation is in the JSON that its page names, as rounded.

Numbers in JSON also count in milliseconds, per cent, millions and binary megabytes. What no benchmark measures (a year,
the size of a model) stands in ``NOT_MEASURED``. docs/results.md is made by a script and has a test of its own.
"""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks/results"
SCALES = (1, 100, 1000, 1e-6, 1e-9, 2**-20, 2**-30)
_NUMBER = re.compile(r"(?<![\w.^])(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:e-?\d+)?")
# By page or README row: sizes of models and data by their names, versions, years, and sums that a reader can do.
NOT_MEASURED = {
    "architectures": {"5.23", "95"},  # a version; from which share on an architecture counts as fast
    "gradient_peers": {"6.9"},  # GPT-2 of 6.9 M
    "gradient_cost_smollm2": {"135"},
    "stored_bytes_smollm2": {"135"},
    "spectrum_smollm2": {"60", "32"},  # 60 vectors of 134.5 M numbers: 32 GB
    "preconditioning": {"2015", "2018", "2023"},
    "dimension": {"40"},  # held-out lines
    "gradients": {"27.6", "36.3", "25.2", "23.6", "3.3", "4.9", "3.7", "3.0", "2016"},  # sequences over seconds; pairs
    "scale": {"2048", "4096", "8192", "16384"},  # numbers a row, and their bytes
}


def leaves(value):
    """Yield every number of a JSON value, those in its texts and the lengths of its lists included."""
    if isinstance(value, dict):
        for key, each in value.items():
            yield from leaves(key)
            yield from leaves(each)
    elif isinstance(value, list):
        yield float(len(value))
        for each in value:
            yield from leaves(each)
    elif isinstance(value, str):
        yield from map(float, re.findall(r"\d+(?:\.\d+)?", value))
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield float(value)


def tolerance(text):
    """Return half a unit of the last digit that a number shows; the zeros at the end of a large one show none."""
    digits, _, exponent = text.partition("e")
    whole, _, decimals = digits.partition(".")
    zeros = len(whole) - len(whole.rstrip("0")) if not decimals and len(whole) > 3 else 0
    return 0.5001 * 10.0 ** (int(exponent or 0) - len(decimals) + min(zeros, 2))


def unbacked(cells, names):
    """Return the numbers in a text that none of these JSON files holds."""
    values = [value for name in names for value in leaves(json.loads((RESULTS / f"{name}.json").read_text("utf-8")))]
    found = (match.replace(",", "") for match in _NUMBER.findall(re.sub(r"`[^`]*`", "", cells)))
    return [
        text for text in found if not any(abs(v * s - float(text)) <= tolerance(text) for v in values for s in SCALES)
    ]


def readme_rows():
    table = (ROOT / "README.md").read_text(encoding="utf-8").split("## Beside the others")[1]
    for line in table.splitlines():
        names = [name for name in re.findall(r"`(\w+)`", line.split("|")[1]) if exists(name)] if "|" in line else []
        if names:
            yield pytest.param(line, names, id=names[0])


def exists(name):
    return (RESULTS / f"{name}.json").exists()


def pages():
    for page in sorted((ROOT / "docs").glob("**/*.md")):
        text = page.read_text(encoding="utf-8")
        named = set(re.findall(r"\b(\w+)\.(?:json|py)\b", text))
        names = sorted({file.stem for name in named for file in RESULTS.glob(f"{name}*.json")})
        lines = [line for line in text.splitlines() if line.startswith("|")]
        if names and lines and page.name != "results.md":
            yield pytest.param("\n".join(lines), names, id=page.stem)


@pytest.mark.parametrize(("line", "names"), [*readme_rows()])
def test_numbers_of_the_readme_are_in_their_json(line, names):
    assert set(unbacked(line, names)) <= NOT_MEASURED.get(names[0], set())


@pytest.mark.parametrize(("table", "names"), [*pages()])
def test_numbers_of_a_page_are_in_its_json(request, table, names):
    page = request.node.callspec.id
    assert set(unbacked(table, names)) <= NOT_MEASURED.get(page, set())


def test_a_wrong_number_is_seen():
    (first, *_) = readme_rows()
    line, names = first.values
    assert unbacked(line.replace("361", "4567891"), names) != unbacked(line, names)


@pytest.mark.parametrize(
    ("shown", "within"), [("12", 0.5), ("1.50", 0.005), ("2e-4", 0.5e-4), ("4900", 50), ("10", 0.5)], ids=str
)
def test_a_number_is_as_exact_as_its_digits(shown, within):
    assert tolerance(shown) == pytest.approx(within, rel=1e-3)
