"""The reference has every public name, every record that a result holds, and what each of their fields is."""

import ast
import dataclasses
import inspect
import re
import sys
import textwrap
import typing
from itertools import pairwise
from pathlib import Path

import pytest

import gradsketch as gs
import gradsketch.errors

TEXT = (Path(__file__).parents[2] / "docs/reference.md").read_text(encoding="utf-8")
NAMED = set(re.findall(r"^\.\. auto(?:class|function):: ([\w.]+)$", TEXT, re.MULTILINE))
SHARED = set(re.findall(r"^\| ((?:`\w+`(?:, )?)+) \|", TEXT, re.MULTILINE))  # rows of the table of names
SHARED = {name for cell in SHARED for name in re.findall(r"\w+", cell)}


def records_in(kind):
    """Yield the dataclasses of this package that stand in an annotation."""
    if dataclasses.is_dataclass(kind) and kind.__module__.startswith("gradsketch"):
        yield kind
    for part in typing.get_args(kind):
        yield from records_in(part)


def hints(record):
    """Return the types of a record's fields; those that only type checkers import are left out."""
    names, module = {}, vars(sys.modules[record.__module__])
    for field in dataclasses.fields(record):
        try:
            names[field.name] = eval(field.type, dict(module)) if isinstance(field.type, str) else field.type
        except NameError:
            continue
    return names


def records():
    public = [getattr(gs, name) for name in gs.__all__]
    found, queue = [], [o for o in public if isinstance(o, type) and issubclass(o, gs.Result) and o is not gs.Result]
    while queue:
        record = queue.pop(0)
        if record not in found:
            found.append(record)
            queue += [inner for kind in hints(record).values() for inner in records_in(kind)]
    return found


def explained(record):
    """Return the fields that the docstring names, and those with a text of their own below them."""
    body = ast.parse(textwrap.dedent(inspect.getsource(record))).body[0].body
    below = {
        node.target.id
        for node, text in pairwise(body)
        if isinstance(node, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
    }
    return below | set(re.findall(r"\w+", " ".join(re.findall(r"``([^`]*)``", record.__doc__))))


def test_every_public_name_is_in_the_reference():
    errors = {
        name for name, public in vars(gradsketch.errors).items() if isinstance(public, type)
    }  # they come as one module
    assert set(gs.__all__) - NAMED - errors == set()


@pytest.mark.parametrize("record", records(), ids=lambda record: record.__name__)
def test_a_record_and_its_fields_are_in_the_reference(record):
    assert record.__name__ in {name.rpartition(".")[2] for name in NAMED}
    fields = {field.name for field in dataclasses.fields(record)}
    assert fields - explained(record) - SHARED == set()
