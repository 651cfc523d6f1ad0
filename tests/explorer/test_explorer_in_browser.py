"""The explorer as a person uses it: asked, filtered, compared, by keys, attacked. Skipped without Chromium."""

import json
import re
from pathlib import Path
from urllib.parse import urlencode, urlsplit

import pytest

from explorer import desk

pytest.importorskip("uvicorn")
from gradsketch.explorer.forms import Question
from gradsketch.explorer.session import Ask
from report import payloads
from report.browser import BROWSER, Tab, axe

pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
PROMPTS = [["the number 7", " squared is 49", False], ["the number 9", " squared is 81", False]]
QUESTIONS = tuple(Question(*prompt) for prompt in PROMPTS)
OURS = re.findall(
    r"\w+",
    "html head meta title link script body a header p span nav button"
    " h1 bdi div form fieldset legend label textarea input select option ul li"
    " details summary small b main h2 h3 h4 mark blockquote ol dl dt"
    " dd svg rect section img footer output table thead tbody tr th td code",
)


@pytest.fixture(scope="module")
def tab(tmp_path_factory):
    with Tab(tmp_path_factory.mktemp("explorer-browser")) as tab:
        yield tab


@pytest.fixture(scope="module")
def session(folder):
    return desk.session(folder)


@pytest.fixture(scope="module")
def link(session):
    with desk.served(session) as link:
        yield link


def visit(tab, link, **state):
    """Open the page as one who was given the link, at a state."""
    tab.resize(1280, 900)
    tab.media()
    state = {name: value if isinstance(value, str) else json.dumps(value) for name, value in state.items()}
    tab("Page.navigate", url="about:blank")
    tab.open(f"{link}#{urlencode(state)}", "ready")
    settled(tab)


def settled(tab):
    tab.wait("!document.body.classList.contains('busy')")


def texts(tab, selector):
    return tab.run(f"[...document.querySelectorAll({json.dumps(selector)})].map((e) => e.textContent)")


def click(tab, selector):
    tab.run(f"document.querySelector({json.dumps(selector)}).click()")


def test_a_question_is_asked_by_keys_alone_and_the_model_answers(tab, link, session):
    visit(tab, link)
    tab.press("Tab")
    assert tab.run("document.activeElement.id") == "skip"
    for _ in range(12):
        if tab.run("document.activeElement.id") == "q0-prompt":
            break
        tab.press("Tab")
    tab.type("the number 7")
    tab.press("Enter")
    tab.wait("document.querySelector('.hit') !== null")
    settled(tab)
    answer = session.ask(Ask((Question("the number 7"),)))
    assert tab.run("$('q0-answer').value") == answer.asked.questions[0].answer
    assert texts(tab, ".query > .hits .text") == [hit.text for hit in answer.hits[0]]
    assert tab.run("document.querySelector('.text span[title]') !== null")
    tab.run("document.querySelector('.text[tabindex]').focus()")
    tab.press("ArrowRight")
    assert tab.run("$('value').textContent") != ""
    while tab.run("document.activeElement.className") != "near":
        tab.press("Tab")
    row = answer.hits[0][0].row
    tab.press("Enter")
    tab.wait(f"Number($('row').value) === {row}")  # the address changes before the row is there
    settled(tab)
    assert tab.run("document.querySelector('.asked').textContent") == session.rows({}, offset=row).rows[0].text
    assert not tab.told("Runtime.exceptionThrown")


@pytest.mark.slow
def test_an_answer_of_the_model_goes_with_its_question(tab, link):
    visit(tab, link, q=[["the number", None, False]], tokens=2)
    assert len(tab.run("$('q0-answer').value")) == 2
    tab.run("$('q0-prompt').focus()")
    tab.type("s")
    assert tab.run("$('q0-answer').value") == ""
    visit(tab, link, q=[["the number", " 7", False]])
    tab.run("$('q0-prompt').focus()")
    tab.type("s")
    assert tab.run("$('q0-answer').value") == " 7"


@pytest.mark.slow
def test_hits_are_filtered_and_scored_anew(tab, link, session):
    visit(tab, link, q=PROMPTS[:1])
    tab.run("$('column').value = 'source'; $('column').dispatchEvent(new Event('change')); $('facet').value = '\"s1\"'")
    click(tab, "#narrow")
    tab.wait("document.querySelector('#chips li') !== null")
    settled(tab)
    tab.run("$('score').value = 'dot'; $('damping').value = '0.5'")
    click(tab, "#submit")
    tab.wait("location.hash.includes('score=dot')")
    settled(tab)
    expected = session.ask(Ask(QUESTIONS[:1], score="dot", damping=0.5, where={"source": ["s1"]})).hits[0]
    shown = texts(tab, ".query > .hits .text")
    assert shown == [hit.text for hit in expected]
    assert all(hit.row % 3 == 1 for hit in expected)
    click(tab, "#chips button")
    tab.wait("document.querySelector('#chips li') === null")
    settled(tab)
    assert texts(tab, ".query > .hits .text") != shown


@pytest.mark.slow
@pytest.mark.parametrize("what", ["questions", "checkpoints"])
def test_two_are_compared_side_by_side(tab, link, session, what):
    if what == "questions":
        visit(tab, link, q=PROMPTS)
        pair = [(session.ask(Ask(QUESTIONS)).id, i) for i in range(2)]
    else:
        visit(tab, link, q=PROMPTS[:1], checkpoint="0", against="1")
        pair = [(session.ask(Ask(QUESTIONS[:1], checkpoint=i)).id, 0) for i in range(2)]
    comparison = session.compare(*pair)
    told = tab.run("document.querySelector('.alike').textContent")
    assert told.startswith(f"{len(comparison.shared)} of 10 proponents")
    assert f"{abs(comparison.correlation):.2f}" in told
    assert len(texts(tab, ".pair .both")) >= 2 * len(comparison.shared)
    boxes = tab.run("[...document.querySelectorAll('.pair > section')].map((s) => s.getBoundingClientRect().top)")
    assert boxes[0] == boxes[1]
    expected = [[hit.text for hit in session.answer(name).hits[number]] for name, number in pair]
    assert texts(tab, ".pair section:first-child > .hits .text") == expected[0]
    assert texts(tab, ".pair section:last-child > .hits .text") == expected[1]


@pytest.mark.slow
def test_questions_that_ask_as_one(tab, link):
    visit(tab, link, q=PROMPTS, together=True)
    assert texts(tab, ".about")[1].startswith("mean of 2 questions")
    assert len(texts(tab, "section.query")) == 1


@pytest.mark.slow
def test_sources_are_summed_and_lead_to_their_rows(tab, link, session):
    visit(tab, link, q=PROMPTS[:1], by="source")
    tab.run("document.querySelector('details.sources').open = true")
    tab.wait("document.querySelector('tbody tr') !== null")
    answer = session.ask(Ask(QUESTIONS[:1]))
    found = session.sources(answer.id, "source")
    assert texts(tab, "tbody th") == [source.value for source in found.sources]
    click(tab, "tbody th button")
    tab.wait("document.querySelector('#chips li') !== null")
    assert found.sources[0].value in texts(tab, "#chips bdi")[0]


@pytest.mark.slow
def test_a_link_holds_the_state_and_no_token(tab, link):
    visit(tab, link, view="rows")
    tab.run("$('words').value = 'squared is 4'; $('order').value = 'loss'")
    click(tab, "#submit")
    tab.wait("location.hash.includes('order=loss')")
    settled(tab)
    address, shown = tab.run("location.href"), texts(tab, ".hit .text")
    assert desk.TOKEN not in address
    assert 0 < len(shown) < desk.N
    tab("Page.navigate", url="about:blank")
    tab.open(address, "ready")  # from a bookmark
    settled(tab)
    assert texts(tab, ".hit .text") == shown
    assert tab.run("$('words').value + $('order').value") == "squared is 4loss"


@pytest.mark.slow
@pytest.mark.parametrize(
    "fragment",
    ["q=[[3]]&k={}&where=[1]", "view=nothing&offset=-3", "q=%", 'where={"a":3}', 'checkpoint=9&q=[["a","b"]]'],
)
def test_a_mangled_link_breaks_nothing(tab, link, fragment):
    tab("Page.navigate", url="about:blank")
    tab.open(f"{link}#{fragment}", "ready")
    settled(tab)
    assert not tab.told("Runtime.exceptionThrown")
    assert tab.run("$('out').childElementCount") > 0


@pytest.mark.slow
def test_pages_of_rows_and_outliers(tab, link, session):
    for view, expected in (("rows", session.rows({}, offset=20)), ("outliers", session.outliers(offset=20))):
        visit(tab, link, view=view)
        tab.run("[...document.querySelectorAll('.pager button')].find((b) => b.textContent.startsWith('Next')).click()")
        tab.wait("location.hash.includes('offset=20')")
        settled(tab)
        assert texts(tab, ".hit .text") == [hit.text for hit in expected.rows]
        assert texts(tab, ".pager span")[0] == "21–40 of 40"


@pytest.mark.slow
def test_without_a_model_the_page_says_what_is_missing(tab, folder):
    with desk.served(desk.session(folder, model=False)) as link:
        visit(tab, link)
        assert tab.run("$('missing').textContent") == "No model is loaded. no such model"
        assert tab.run("$('submit').disabled")
        visit(tab, link, view="row", row=3)
        assert len(texts(tab, ".query > .hits .text")) == 10
    tab.run("go({ row: 5 })")
    tab.wait("document.querySelector('.error') !== null")
    assert "has ended" in tab.run("document.querySelector('.error').textContent")


VIEWS = {
    "welcome": {},
    "answer": {"q": PROMPTS[:1]},
    "pair": {"q": PROMPTS},
    "rows": {"view": "rows"},
    "outliers": {"view": "outliers"},
    "row": {"view": "row", "row": 3},
}


@pytest.mark.slow
@pytest.mark.parametrize("view", VIEWS)
def test_axe_finds_nothing_and_nothing_is_wider_than_a_phone(tab, link, view):
    visit(tab, link, **VIEWS[view], where={"year": [1990, 1991, 1992]} if view == "answer" else {})
    tab.run("for (const list of document.querySelectorAll('details')) list.open = true")
    if view == "answer":
        tab.wait("document.querySelector('tbody tr') !== null")
    for width, scheme in ((1280, "light"), (1280, "dark"), (390, "light"), (390, "dark"), (320, "light")):
        tab.resize(width, 844)
        tab.media(scheme=scheme)
        if axe() is not None:
            assert tab.violations() == []
        wide = tab.run("[...document.querySelectorAll('body *')]"
                       ".filter((e) => e.getBoundingClientRect().right > innerWidth + 1"
                       " && e.checkVisibility() && !e.closest('.heard')).map((e) => e.outerHTML)")  # fmt: skip
        assert wide == []


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """An index whose texts, ids, columns and values are attacks."""
    whole = [
        text.encode("utf-8", "replace").decode() for text in payloads.TEXTS
    ]  # no column holds half a surrogate pair
    images = payloads.IMAGES
    data = [
        {
            "text": f"{text} {i}",
            "id": text,
            whole[i % 5]: text,
            "image": images[i % len(images)],
            "group": whole[i % 9],
            "flag": True,
        }
        for i, text in enumerate(whole)
    ]
    path = tmp_path_factory.mktemp("hostile") / "in<img src=x onerror=PWN=1>dex"
    opened = desk.session(desk.build(path, data, checkpoints=None, weights=None))
    opened.loaded = payloads.TEXTS[0]
    with desk.served(opened) as link:
        yield link


EVENTS = "['mouseover','click','focus','input','toggle','error','load','keydown','animationstart','beforetoggle']"


@pytest.mark.slow
def test_sixty_attacks_run_nothing_and_load_nothing(tab, hostile):
    requests = []
    asked = [[text, text, False] for text in payloads.TEXTS if "\ud800" not in text]
    states = [{"q": asked[i : i + 20], "k": 2, "opponents": 1} for i in range(0, 60, 20)]
    states += [{"view": view, "offset": offset} for view in ("rows", "outliers") for offset in (0, 20, 40)]
    states += [{"view": "row", "row": 4}, {"view": "rows", "where": {payloads.TEXTS[0]: [payloads.TEXTS[0]]}}]
    states += [
        {"view": "row", "row": 5, "by": payloads.TEXTS[1]},
        {"score": payloads.TEXTS[0], "damping": payloads.TEXTS[1], "q": asked[:1]},
    ]
    for state in states:
        visit(tab, hostile, **state)
        tab.run("for (const list of document.querySelectorAll('details')) list.open = true")
        tab.run("for (const element of document.querySelectorAll('#out, #out *:not(a):not(button)'))"
                f" for (const name of {EVENTS})"
                " element.dispatchEvent(new Event(name, {bubbles: false}));")  # fmt: skip
        tab.run("new Promise((done) => setTimeout(done, 100))")
        assert tab.run("$('out').childElementCount") > 0
        assert tab.run("typeof PWN") == "undefined"
        assert set(tab.run("[...new Set([...document.querySelectorAll('*')].map((e) => e.localName))]")) <= set(OURS)
        attributes = "[...document.querySelectorAll('*')].flatMap((e) => e.getAttributeNames())"
        attributes += ".filter((n) => /^on|^style$/.test(n))"
        assert tab.run(attributes) == []
        assert tab.run(
            "[...document.querySelectorAll('a')].every((a) => a.protocol === 'http:' && a.host === location.host)"
        )
        assert not tab.told("Page.javascriptDialogOpening")
        assert not tab.told("Runtime.exceptionThrown")
        requests += [event["request"]["url"] for event in tab.told("Network.requestWillBeSent")]
    assert {urlsplit(url).netloc for url in requests if not url.startswith("data:")} == {urlsplit(hostile).netloc}
    assert not Path("PWNED").exists()
