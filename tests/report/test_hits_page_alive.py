"""The page in a browser, as a reader uses it: attacked, searched, printed, read aloud. Skipped without Chromium."""

import base64
import random
import re
from dataclasses import replace
from pathlib import Path

import pytest

from gradsketch.attribution.results import TokenContribution
from gradsketch.report.hits import hits_page
from report import payloads, sample
from report.browser import BROWSER, Tab, axe

pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
OURS = re.findall(
    r"\w+",
    "html head meta title style script body a header p span h1 bdi form input output button div nav ol li svg rect b"
    " main section h2 mark h3 blockquote small dl dt dd details summary footer code img",
)


@pytest.fixture(scope="module")
def tab(tmp_path_factory):
    with Tab(tmp_path_factory.mktemp("browser")) as tab:
        yield tab


@pytest.fixture
def page(tab, tmp_path):
    tab.resize(1280, 900)
    tab.media()
    path = hits_page(sample.everyday(), tmp_path / "why.html", title="Who taught it?", introduction="A trial.")
    tab.open(path)
    tab.run("localStorage.clear()")
    tab.open(path)
    return path


def attacked():
    def hit(rank, text, image):
        metadata = {text: text, f"image {text}": image, f"flag {text}": True, f"list {text}": [text, {text: text}]}
        one = sample.hit(rank, 0.5, text, **metadata)
        return replace(one, id=text, tokens=(TokenContribution(text, 0.3), TokenContribution(f" {text}", -0.2)))

    queries = []
    for i, text in enumerate(payloads.TEXTS):
        image = payloads.IMAGES[i % len(payloads.IMAGES)]
        found = sample.query(
            text, text, [hit(1, text, image), hit(2, payloads.TEXTS[i - 7], image)], [hit(1, text, image)]
        )
        queries.append(replace(found, example={"text": text, "image": image}))
    hits = sample.hits(*queries)
    score = replace(hits.score, formula=payloads.TEXTS[0], units=payloads.TEXTS[1])
    return replace(hits, score=score, index=payloads.TEXTS[2], sign=payloads.TEXTS[3])


def test_sixty_attacks_run_nothing_and_load_nothing(tab, tmp_path):
    texts = payloads.TEXTS
    page = hits_page(attacked(), tmp_path / "why.html", title=texts[4], introduction=texts[5], notes=texts)
    tab.open(page)
    events = "['mouseover','click','focus','input','toggle','error','load','keydown','animationstart','beforetoggle']"
    tab.run(
        "for (const element of document.querySelectorAll('*'))"
        f" for (const name of {events}) element.dispatchEvent(new Event(name, {{bubbles: true}}));"
    )
    tab.run("new Promise((done) => setTimeout(done, 500))")
    assert tab.run("typeof PWN") == "undefined"
    requests = [event["request"]["url"] for event in tab.told("Network.requestWillBeSent")]
    assert [url for url in requests if not url.startswith("data:")] == [page.as_uri()]
    assert not tab.told("Page.javascriptDialogOpening")
    assert not tab.told("Runtime.exceptionThrown")
    names = tab.run("[...new Set([...document.querySelectorAll('*')].map((e) => e.localName))]")
    assert set(names) <= set(OURS)
    assert tab.run("document.querySelectorAll('script').length") == 1
    attributes = tab.run(
        "[...document.querySelectorAll('*')].flatMap((e) => e.getAttributeNames()).filter((n) => /^on|^style$/.test(n))"
    )
    assert attributes == []
    assert not Path("PWNED").exists()


def crowded():
    random.seed(0)
    words = ["the", "capital", "of", "a", "country", "is", "where", "its", "king", "keeps", "many", "old", "books"]

    def hit(rank):
        tokens = tuple((f" {random.choice(words)}", random.uniform(-1, 1)) for _ in range(random.choice((12, 40, 160))))
        return sample.hit(rank, 0.5 / rank, "".join(text for text, _ in tokens), tokens=tokens)

    return sample.hits(*(sample.query(f"question {i}", "yes", [hit(r) for r in range(1, 51)]) for i in range(20)))


def test_a_thousand_hits_are_laid_out_at_once(tab, tmp_path):
    tab.resize(1280, 900)
    before = tab.measured("LayoutCount")
    tab.open(hits_page(crowded(), tmp_path / "why.html"))
    assert tab.run("document.querySelectorAll('.more').length") > 100
    assert tab.measured("LayoutCount") - before < 40
    before = tab.measured("LayoutCount")
    tab.run("$('search').focus()")
    tab.type("capital of")
    tab.wait("$('count').textContent !== ''")
    assert tab.run("$('count').textContent").endswith(" of 1000")
    assert tab.measured("LayoutCount") - before < 60


def test_a_search_waits_until_the_fingers_rest(tab, page):
    tab.run("window.searches = 0; new MutationObserver(() => searches++).observe($('count'), {childList: true})")
    tab.run("$('search').focus()")
    tab.type("capital")
    tab.wait("$('count').textContent !== ''")
    assert tab.run("searches") <= 2


def test_folded_lists_are_after_a_search_what_they_were(tab, page):
    lists = "[...document.querySelectorAll('details')].map((list) => list.open)"
    tab.run("document.querySelector('details').open = true")
    tab.press("Escape")
    assert tab.run(lists) == [True, False]
    tab.run("$('search').value = 'nepal'; search()")
    assert tab.run(lists) == [False, True]
    tab.run("$('search').value = 'nepal k'; search()")
    tab.run("$('search').focus()")
    tab.press("Escape")
    assert tab.run("$('search').value") == ""
    assert tab.run(lists) == [True, False]


def test_the_theme_is_remembered_and_a_browser_that_forgets_is_no_error(tab, page):
    tab.run("$('theme').click()")
    assert tab.run("document.documentElement.dataset.theme") == "dark"
    tab.open(page)
    assert tab.run("document.documentElement.dataset.theme") == "dark"
    tab.run("localStorage.clear()")
    forgetful = "Object.defineProperty(window, 'localStorage', {get() { throw new Error('no'); }})"
    script = tab("Page.addScriptToEvaluateOnNewDocument", source=forgetful)["identifier"]
    tab.open(page)
    tab.run("$('theme').click()")
    assert tab.run("document.documentElement.dataset.theme") == "dark"
    assert not tab.told("Runtime.exceptionThrown")
    tab("Page.removeScriptToEvaluateOnNewDocument", identifier=script)


def test_numbers_of_words_are_reached_by_keys(tab, page):
    tab.run("document.querySelector('.text[tabindex]').focus()")
    for expected in ("capital  +0.016", "of  -0.0078", "France  +0.2", "is  +0.078", "Ankara  +0.51"):
        tab.press("ArrowRight")
        assert tab.run("$('value').textContent") == expected
    tab.press("ArrowLeft")
    assert tab.run("document.querySelector('.at').textContent") == "is"
    tab.press("End")
    assert tab.run("$('value').textContent").startswith(".")
    tab.press("Escape")
    assert tab.run("$('value').textContent") == ""
    assert tab.run("document.querySelector('.hit .heard').textContent").startswith("Strongest words: Ankara +0.51, ")
    assert tab.run("document.querySelector('.text[tabindex]').getAttribute('aria-describedby')") == "keys"


def test_the_first_stop_skips_to_the_examples_and_buttons_say_what_they_did(tab, page):
    tab("Input.dispatchKeyEvent", type="rawKeyDown", key="Tab", code="Tab", windowsVirtualKeyCode=9)
    assert tab.run("document.activeElement.className") == "skip"
    assert tab.run("document.querySelector(document.activeElement.getAttribute('href')).localName") == "main"
    more = "document.querySelector('.more')"
    assert tab.run(f"{more}.getAttribute('aria-expanded')") == "false"
    tab.run(f"{more}.click()")
    assert tab.run(f"{more}.getAttribute('aria-expanded') + {more}.textContent") == "trueShow less"


def test_questions_from_right_to_left_stand_on_the_right(tab, page):
    directions = tab.run("[...document.querySelectorAll('h2')].map((h) => getComputedStyle(h).direction)")
    assert directions[:4] == ["ltr", "ltr", "rtl", "ltr"]


def test_legends_stand_where_the_symbols_are(tab, page):
    assert tab.run("document.querySelectorAll('main .legend').length") == 2  # of the queries with coloured words
    assert "first ten" in tab.run("document.querySelector('nav .legend').textContent")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_print_is_light_coloured_unfolded_and_fills_its_pages(tab, page, scheme):
    tab.media("screen", scheme)
    tab.run("document.documentElement.dataset.theme = 'dark'")
    tab.media("print", scheme)
    style = lambda selector, name: tab.run(f"getComputedStyle(document.querySelector('{selector}')).{name}")  # noqa: E731
    assert style("body", "backgroundColor") == "rgb(255, 255, 255)"
    assert style("body", "color") == "rgb(0, 0, 0)"
    assert style(".p9", "printColorAdjust") == "exact"
    assert style(".p9", "backgroundColor") == "rgba(190, 76, 18, 0.5)"
    assert style(".tools", "display") == "none"
    assert tab.run("document.querySelector('details .hit').checkVisibility({contentVisibilityAuto: true})")
    assert tab.run("[...document.querySelectorAll('.text.long')].every((t) => t.scrollHeight <= t.clientHeight + 4)")
    pdf = base64.b64decode(tab("Page.printToPDF", paperWidth=8.27, paperHeight=11.69)["data"])
    assert 2 <= len(re.findall(rb"/Type\s*/Page\b", pdf)) <= 4


@pytest.mark.skipif(axe() is None, reason="no axe-core on this machine: make test-page installs it")
@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (1280, "dark"), (390, "light"), (390, "dark")])
def test_axe_finds_nothing(tab, page, width, scheme):
    tab.resize(width, 900)
    tab.media("screen", scheme)
    tab.run("for (const list of document.querySelectorAll('details')) list.open = true")
    assert tab.violations() == []
