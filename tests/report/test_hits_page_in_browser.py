"""The page as a browser shows it, at desktop and phone widths, light and dark. Skipped where there is no Chromium."""

import shutil
import subprocess
from html import escape
from pathlib import Path

import pytest
import torch

from gradsketch.report.hits import hits_page
from report import sample

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")

QUIET = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-dev-shm-usage")


def browse(page: Path, *options: str) -> subprocess.CompletedProcess[str]:
    profile = f"--user-data-dir={page.parent / 'profile'}"
    command = [str(BROWSER), *QUIET, profile, "--enable-logging=stderr", *options, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def screenshot(page: Path, width: int, height: int, *options: str) -> torch.Tensor:
    """Return the picture as [height, width, 3], from 0 to 1."""
    image = pytest.importorskip("matplotlib.image")
    path = page.with_suffix(".png")
    browse(page, f"--screenshot={path}", f"--window-size={width},{height}", "--hide-scrollbars", *options)
    return torch.tensor(image.imread(path))[..., :3]


def dom(page: Path, script: str = "") -> str:
    """Return the document after the page's script ran, and after ``script``, as if typed into the console."""
    if script:  # the page's policy runs no script but its own, so this copy goes without the policy
        html = page.read_text(encoding="utf-8").replace("Content-Security-Policy", "x-nothing")
        page = page.with_name("scripted.html")
        page.write_text(html.replace("</body>", f"<script>{script}</script></body>"), encoding="utf-8")
    done = browse(page, "--dump-dom")
    assert "CONSOLE" not in done.stderr, done.stderr
    return done.stdout


@pytest.fixture
def everyday(tmp_path):
    return hits_page(sample.everyday(), tmp_path / "why.html")


@pytest.mark.parametrize("width", [1280, 500])
def test_it_fills_the_window_in_light_and_in_dark(everyday, width):
    light = screenshot(everyday, width, 900)
    dark = screenshot(everyday, width, 900, "--force-dark-mode", "--blink-settings=preferredColorScheme=0")
    assert light.shape == dark.shape == (900, width, 3)
    assert light.mean() > 0.85
    assert dark.mean() < 0.25
    for picture in (light, dark):
        paper = picture[-1, 0]
        printed = (picture - paper).abs().amax(-1) > 0.2
        assert printed.float().mean() > 0.01  # words and bars are there
        assert not printed[:, -4:].any()  # and stop before the edge
    orange = (light[..., 0] > 0.6) & (light[..., 2] < 0.25)
    assert orange.sum() > 300  # bars


def test_nothing_is_wider_than_a_phone(tmp_path):
    for name, hits in (("everyday", sample.everyday()), ("hostile", sample.hostile())):
        html = hits_page(hits, tmp_path / f"{name}.html").read_text(encoding="utf-8")
        html = html.replace("Content-Security-Policy", "x-nothing").replace(
            "</body>", f"<script>{MEASURE}</script></body>"
        )
        phone = tmp_path / f"{name}-phone.html"  # a browser's own window is never narrower than 500
        phone.write_text(f'<body><iframe width="360" height="800" srcdoc="{escape(html)}"></iframe></body>')
        assert 'data-wide=""' in dom(phone), name


MEASURE = """
const wide = [...document.querySelectorAll("main *, header *, footer *, form *")]
  .filter((element) => element.getBoundingClientRect().right > 360).map((element) => element.outerHTML);
parent.document.body.dataset.wide = innerWidth === 360 ? wide.join() : "not 360";
"""


def test_its_script_runs_under_its_policy_and_no_other_does(tmp_path):
    page = hits_page(sample.hostile(), tmp_path / "why.html")
    html = dom(page)
    assert "<title>Which training examples" in html
    assert 'class="text long"' in html  # a long text was folded
    assert html.count('class="more"') == 2


def test_search_keeps_what_holds_every_word(everyday):
    html = dom(everyday, "$('search').value = 'LIMA capital'; search();")
    shown = [part for part in html.split('<li class="hit')[1:] if not part.split(">")[0].endswith('hidden=""')]
    assert len(shown) == 2
    assert all("Lima" in part for part in shown)
    assert ">2 of 15</output>" in html


def test_search_that_finds_nothing_says_so(everyday):
    html = dom(everyday, "$('search').value = 'zebra'; search();")
    assert 'id="nothing">' in html
    assert 'id="nothing" hidden' in dom(everyday)


def test_the_button_turns_the_light_off_and_on(everyday):
    assert 'data-theme="dark"' in dom(everyday, "$('theme').click();")
    assert 'data-theme="light"' in dom(everyday, "$('theme').click(); $('theme').click();")


def test_a_touched_token_shows_its_number(everyday):
    assert "Ankara  +0.51" in dom(everyday, "document.querySelector('.p9').click();")
