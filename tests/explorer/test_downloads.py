"""Files of an answer: the page, strict JSON, and a table without formulas."""

import csv
import io
import json
from dataclasses import replace

import pytest

from gradsketch.attribution.results import Hits
from gradsketch.explorer.downloads import download, harmless
from gradsketch.explorer.session import Answer, Ask
from report import payloads, sample

FORMULAS = [
    "=1+1",
    "+1",
    "-1",
    "@SUM(A1)",
    "\t=1",
    "\r=1",
    "\n=1",
    "  =1",
    "=cmd|' /C calc'!A0",
    "＝1",
    "－2+3",
    "\x00=1",
]
FORMULAS += ['=HYPERLINK("http://evil","x")', "-2+3+cmd|' /C calc'!A0", "@x", "%0A=1", '";=1']


def of(hits):
    return Answer("id", Ask(()), hits)


def table(hits):
    text = download(of(hits), "csv").decode()
    return list(csv.reader(io.StringIO(text, newline="")))


@pytest.mark.parametrize("text", FORMULAS)
def test_no_cell_is_a_formula(text):
    hit = replace(sample.hit(1, -0.5, text, **{text: text, "nested": [text]}), id=text)
    for row in table(sample.hits(sample.query(text, text, [hit], [hit]))):
        for cell in row:
            number = cell.lstrip("-").replace(".", "", 1).isdigit()
            assert number or not cell.lstrip(" ").startswith(("=", "+", "-", "@", "\t", "\r", "\n", "＝", "－")), cell


def test_what_is_no_formula_stays_as_it_is():
    for cell in ("France", "a=b", "1-2", "", 'say "hi", twice', "two\nlines", "日本", "5e3"):
        assert harmless(cell) == cell
    for cell in (-0.25, 3, None, True):
        assert harmless(cell) is cell


def test_the_table_has_every_hit_with_its_numbers():
    hits = sample.everyday()
    head, *rows = table(hits)
    assert head[:9] == ["question", "asked", "answer", "kind", "rank", "row", "id", "score", "text"]
    assert set(head[11:]) == {"source", "planted", "language"}
    expected = [(n, kind, hit) for n, q in enumerate(hits, 1) for kind, found in
                (("proponent", q.proponents), ("opponent", q.opponents)) for hit in found]  # fmt: skip
    assert len(rows) == len(expected)
    for row, (number, kind, hit) in zip(rows, expected, strict=True):
        assert (row[0], row[3], int(row[5]), float(row[7])) == (str(number), kind, hit.row, hit.score)
        assert row[8] == hit.text.replace("\r", "")


def test_json_is_strict_and_read_back():
    hits = sample.hostile()
    text = download(of(hits), "json").decode()

    def refuse(name):
        raise AssertionError(name)

    assert json.loads(text, parse_constant=refuse)["result"] == "Hits"
    assert Hits.from_json(text) == hits


def test_the_page_is_the_report():
    page = download(of(sample.everyday()), "html").decode()
    assert "The capital city of France is" in page
    assert "Content-Security-Policy" in page


@pytest.mark.parametrize("kind", ["html", "json", "csv"])
def test_hostile_texts_are_written_in_every_format(kind):
    queries = [sample.query(text, text, [sample.hit(1, 0.5, text, **{text: text})]) for text in payloads.TEXTS]
    written = download(of(sample.hits(*queries)), kind).decode("utf-8")
    assert "\x1b" not in written
    if kind == "html":
        assert written.count("<script>") == 1


def test_no_two_columns_of_a_table_have_one_name():
    hit = replace(sample.hit(1, 0.5, "a text"), metadata={"kind": "fact", "answer": "no", "source": "x"})
    head, row = table(sample.hits(sample.query("q", "yes", [hit])))
    assert len(set(head)) == len(head)
    found = dict(zip(head, row, strict=True))
    assert (found["kind"], found["metadata_kind"]) == ("proponent", "fact")
    assert (found["answer"], found["metadata_answer"], found["source"]) == ("yes", "no", "x")
