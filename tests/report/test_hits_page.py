"""The page of hits: complete, self-contained, unharmed by hostile text, whole or not written at all."""

import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from gradsketch.attribution.scores import KINDS
from gradsketch.errors import InputError
from gradsketch.report.hits import hits_page
from report import sample

VOID = {"meta", "input", "img", "rect"}


class Page(HTMLParser):
    """Tags with their attributes, and the text that is neither style nor script."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.text += data

    def with_class(self, name: str) -> list[dict[str, str | None]]:
        return [a for _, a in self.tags if name in (a.get("class") or "").split()]


def page_of(hits, tmp_path, **options) -> Page:
    return Page(hits_page(hits, tmp_path / "why.html", **options).read_text(encoding="utf-8"))


def test_everything_a_reader_needs_is_there(tmp_path):
    page = page_of(
        sample.everyday(), tmp_path, title="Who taught it?", introduction="A trial.", notes=["before: Paris"]
    )
    for text in ("Who taught it?", "A trial.", "before: Paris", "The capital city of France is", "أوسلو", "日本の首都"):
        assert text in page.text
    for text in ("+0.78", "-0.07", "row-10", "planted", "mean of 8 examples", "4,096", "runs/facts", "X̂ᵀX̂"):
        assert text in page.text
    assert len(page.with_class("hit")) == 15
    assert page.open == []


def test_the_method_of_hits_writes_the_same_page(tmp_path):
    hits = sample.everyday()
    assert hits.to_html(tmp_path / "a.html").read_bytes() == hits_page(hits, tmp_path / "b.html").read_bytes()


def test_bars_are_proportional_to_scores_on_one_scale_for_cosines(tmp_path):
    def widths(hits):
        html = hits_page(hits, tmp_path / "why.html").read_text(encoding="utf-8")
        bars = re.findall(r'class="bar".*?width="([\d.]+)"', html)
        return [float(width) for width in bars]

    hits = sample.hits(
        sample.query("a", None, [sample.hit(1, 0.8, "x"), sample.hit(2, 0.2, "y")], [sample.hit(1, -0.4, "z")]),
        sample.query("b", None, [sample.hit(1, 0.4, "x")]),
    )
    assert widths(hits) == [100, 25, 50, 50]
    assert widths(replace(hits, score=KINDS["dot"].described(None))) == [100, 25, 50, 100]


def test_tokens_are_shaded_by_their_share_of_the_querys_strongest(tmp_path):
    strong = sample.hit(1, 1.0, "ab", tokens=((" a", 0.9), ("b", -0.3), ("c", 0.01), ("d", 0.0)))
    weak = sample.hit(2, 0.1, "ab", tokens=(("e", 0.1),))
    html = hits_page(sample.hits(sample.query("q", None, [strong, weak])), tmp_path / "why.html").read_text()
    spans = re.findall(r'( ?)<span(?: class="(\w+)")? title="([^"]+)">(\w)</span>', html)
    assert spans == [(" ", "p9", "+0.9", "a"), ("", "n3", "-0.3", "b"), ("", "", "+0.01", "c"), ("", "p1", "+0.1", "e")]


def test_the_page_asks_nothing_of_the_network(tmp_path):
    page = page_of(sample.everyday(), tmp_path)
    addresses = [v for _, a in page.tags for k, v in a.items() if k in ("src", "href", "action", "srcset", "data")]
    assert addresses
    assert all(address.startswith("#") for address in addresses)
    policy = next(a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none';")
    assert "unsafe" not in policy
    style = (tmp_path / "why.html").read_text(encoding="utf-8").split("<style>")[1].split("</style>")[0]
    assert "url(" not in style
    assert "@import" not in style


def test_hostile_text_stays_text(tmp_path):
    page = page_of(sample.hostile(), tmp_path)
    assert page.text.count(sample.HOSTILE) == 4  # the query, its answer, the hit and a metadata value
    assert [tag for tag, _ in page.tags].count("script") == 1
    assert not [tag for tag, _ in page.tags if tag == "img"]
    assert not [a for _, a in page.tags if any(name.startswith("on") for name in a)]


def test_what_has_no_picture_is_shown_by_one(tmp_path):
    page = page_of(sample.hostile(), tmp_path)
    assert "null ␀, escape ␛[31m, delete ␡, surrogate \ufffd" in page.text
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f]", page.text)
    assert "unknown" in page.text
    assert "nan" not in page.text.split()


def test_long_texts_are_cut_around_their_strongest_token_and_say_so(tmp_path):
    tokens = (("a" * 50_000, 0.0), ("needle", 0.5), ("b" * 49_994, 0.0))
    hits = sample.hits(sample.query("q", None, [sample.hit(1, 0.5, "x" * 100_000, tokens=tokens)]))
    page = page_of(hits, tmp_path)
    assert "needle" in page.text
    left, right = (int(n.replace(",", "")) for n in re.findall(r"([\d,]+) characters (?:before|after)", page.text))
    assert left + right + 4000 == 100_000
    assert (tmp_path / "why.html").stat().st_size < 40_000


def test_images_in_metadata_are_shown(tmp_path):
    image = "data:image/png;base64,iVBORw0KGgo="
    page = page_of(sample.hits(sample.query("q", None, [sample.hit(1, 0.5, None, picture=image)])), tmp_path)
    assert ("img", {"src": image, "alt": "picture"}) in page.tags


def test_flags_are_shown_by_name_where_they_are_true(tmp_path):
    hits = [sample.hit(1, 0.5, "x", planted=True, checked=False), sample.hit(2, 0.4, "y", planted=False, checked=True)]
    page = page_of(sample.hits(sample.query("q", None, hits)), tmp_path)
    assert len(page.with_class("flag")) == 2
    assert page.text.split().count("planted") == page.text.split().count("checked") == 1
    assert "True" not in page.text
    assert "False" not in page.text


def test_no_query_at_all(tmp_path):
    assert "No query was asked." in page_of(sample.hits(), tmp_path).text


def test_a_path_that_is_not_a_file_is_refused_and_nothing_is_left(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("mine")
    for path in ("folder", "file/why.html"):
        with pytest.raises(InputError, match="Choose another path"):
            hits_page(sample.everyday(), tmp_path / path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]
    assert (tmp_path / "file").read_text() == "mine"


def test_a_folder_is_made_and_an_older_page_replaced(tmp_path):
    path = tmp_path / "new" / "why.html"
    hits_page(sample.everyday(), path)
    hits_page(sample.hits(), path)
    assert "No query was asked." in path.read_text()
