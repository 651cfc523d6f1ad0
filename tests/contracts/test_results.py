"""The battery every type of result must pass: one grammar for all of them."""

import importlib
import inspect
import json
import pkgutil
import random
from dataclasses import FrozenInstanceError, fields, replace
from pathlib import Path

import pytest

import gradsketch as gs
from contracts.result_cases import RESULTS
from gradsketch.errors import InputError

every = pytest.mark.parametrize("result", RESULTS, ids=lambda r: type(r).__name__)


def refuse(constant):
    raise AssertionError(f"{constant} is not JSON")


def types(base=gs.Result):
    return {kind for sub in base.__subclasses__() for kind in {sub} | types(sub)}


def test_every_type_is_here_and_public_and_in_the_reference():
    for module in pkgutil.walk_packages(gs.__path__, "gradsketch."):
        # JAX and Triton are no part of the dev extra, and what needs them has no results of its own.
        if not module.name.startswith(("gradsketch.__main__", "gradsketch.jax", "gradsketch.kernels.programs")):
            importlib.import_module(module.name)
    found = {kind for kind in types() if kind.__module__.startswith("gradsketch.")}
    assert found == {type(result) for result in RESULTS}
    reference = (Path(__file__).parents[2] / "docs" / "reference.md").read_text(encoding="utf-8")
    for kind in found:
        assert getattr(gs, kind.__name__) is kind
        assert f".. autoclass:: {kind.__name__}\n" in reference
        assert set(kind.__abstractmethods__) == set()


@every
def test_json_and_back(result, tmp_path):
    text = result.to_json(tmp_path / "new" / "result.json")
    record = json.loads(text, parse_constant=refuse)
    assert record["result"] == type(result).__name__
    assert record.keys() >= {f.name for f in fields(result)} | set(result.derived)
    assert (tmp_path / "new" / "result.json").read_text(encoding="utf-8") == text + "\n"
    for again in (type(result).from_json(text), type(result).from_json(tmp_path / "new" / "result.json")):
        assert again == result
        assert hash(again) == hash(result)
        assert again.to_json() == text
        assert str(again) == str(result)


@every
def test_a_changed_digit_is_told(result, tmp_path):
    text, draw = result.to_json(), random.Random(0)
    digits = [place for place, letter in enumerate(text) if letter.isdigit()]
    for place in draw.sample(digits, min(20, len(digits))):
        path = tmp_path / "changed.json"
        path.write_text(f"{text[:place]}{(int(text[place]) + 1) % 10}{text[place + 1 :]}", encoding="utf-8")
        with pytest.raises(InputError, match="cannot be read"):
            type(result).from_json(path)
    record = json.loads(text)
    assert type(result).from_json(json.dumps(record, indent=4, sort_keys=True)) == result  # written otherwise
    del record["crc32"]
    assert type(result).from_json(json.dumps(record)) == result  # as it was written before it had a checksum


@every
def test_fields_come_back_as_they_were(result):
    again = type(result).from_json(result.to_json())
    for field in fields(result):
        if field.name != "queries":  # hold what a user asked, of which lists come back for tuples
            assert type(getattr(again, field.name)) is type(getattr(result, field.name)), field.name


@every
def test_what_is_written_is_whole_or_not_there(result, tmp_path, monkeypatch):
    path = tmp_path / "result.json"
    path.write_text("what was there")

    def die(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        for name in ("replace", "rename", "link", "fsync"):
            patch.setattr(f"os.{name}", die)
        with pytest.raises(KeyboardInterrupt):
            result.to_json(path)
    assert path.read_text() == "what was there"
    assert [entry.name for entry in tmp_path.iterdir() if entry.suffix == ".json"] == ["result.json"]
    with pytest.raises(InputError, match="a folder"):
        result.to_json(tmp_path)


@every
def test_one_line_and_a_table(result):
    assert result.summary()
    assert "\n" not in result.summary()
    assert "\n" in str(result) or not getattr(result, "queries", True)
    for text in (result.summary(), str(result)):
        assert "tensor(" not in text
        assert "\n\n\n" not in text
    assert all(len(line) <= 120 or line == result.summary() for line in str(result).splitlines())


@every
def test_a_figure(result, tmp_path):
    figure_module = pytest.importorskip("matplotlib.figure")
    figure = result.plot()
    assert isinstance(figure, figure_module.Figure)
    assert result.plot(tmp_path / "new" / "figure.png") is not figure
    assert (tmp_path / "new" / "figure.png").read_bytes().startswith(b"\x89PNG")
    result.plot(tmp_path / "figure.svg")
    assert "<svg" in (tmp_path / "figure.svg").read_text(encoding="utf-8")
    with pytest.raises(InputError, match=r"Type figure\.png"):
        result.plot(tmp_path / "figure.txt")
    assert not (tmp_path / "figure.txt").exists()


@every
def test_frozen_and_equal_by_what_it_holds(result):
    name = fields(result)[0].name
    with pytest.raises(FrozenInstanceError):
        setattr(result, name, None)
    assert replace(result) == result
    assert result != 3
    assert len({result, replace(result)}) == 1
    number = next((f.name for f in fields(result) if isinstance(getattr(result, f.name), int)), None)
    if number:
        assert replace(result, **{number: getattr(result, number) + 1}) != result


@every
def test_the_docstring_names_no_field_that_is_missing(result):
    assert inspect.getdoc(type(result))
    assert not (inspect.getdoc(type(result)) or "").startswith(f"{type(result).__name__}(")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        "3",
        '{"result": "Spectrum"}',
        '{"result": "Estimate"}',
        '{"result": "Estimate", "value": 1, "standard_error": 2, "colour": 3}',
        Path("nowhere.json"),
    ],
)
def test_what_is_no_result_is_explained(text):
    with pytest.raises(InputError, match=r"what Estimate\.to_json wrote"):
        gs.Estimate.from_json(text)
