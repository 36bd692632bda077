"""Report pages in a real browser: all text apart and whole, both colour schemes, narrow and wide, a quiet console."""

from __future__ import annotations

from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest

from browser import SCHEMES, WIDTHS, Browser, View, browser
from report_files import called, write_everything

PARTS = ("layouts", "waterfall", "masks", "load", "timelines", "fidelity", "training", "evaluation", "plans", "results")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_everything(tmp_path_factory.mktemp("everything"))
    called("report", folder, "-o", folder / "report.html")
    return folder / "report.html"


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("profile")) as started:
        yield started


class Links(HTMLParser):
    """What a page would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.fetched += [value or "" for name, value in attrs if name in ("src", "srcset", "href", "data", "action")]


def test_the_page_asks_nobody_and_brings_plotly_once(page: Path) -> None:
    text, links = page.read_text(), Links()
    links.feed(text)
    assert [link for link in links.fetched if not link.startswith("data:")] == []
    assert text.count("plotly.js v") == 1
    assert len(text.encode()) < 10_000_000
    assert "kernel <1>" not in text and "kernel &lt;1&gt;" in text


def test_the_page_says_what_it_was_made_of(page: Path) -> None:
    text = page.read_text()
    for name in ("plan.json", "simulated.json.gz", "measured.json.gz", "run.yaml", "results.json", "cluster.yaml"):
        assert f"/{name}</td>" in text
    assert "training metrics of 4 ranks" in text
    assert "left alone: notes.txt." in text


def colours(view: View) -> tuple[str, str]:
    """The page's own background, and that of the text of a figure."""
    body = view.evaluate("getComputedStyle(document.body).backgroundColor")
    return body, view.evaluate("getComputedStyle(document.querySelector('.plot svg text')).fill")


@pytest.mark.parametrize(("width", "first"), [(WIDTHS[0], SCHEMES[0]), (WIDTHS[1], SCHEMES[1])])
def test_text_is_apart_whole_and_readable_under_either_setting(
    chromium: Browser, page: Path, width: int, first: str
) -> None:
    second = next(scheme for scheme in SCHEMES if scheme != first)
    with chromium.view(page, width=width, scheme=first) as view:
        assert view.evaluate("document.querySelectorAll('.plot .main-svg').length") >= 20
        assert view.evaluate("innerWidth") == width
        assert view.faults() == {}
        before = colours(view)
        view.set_scheme(second)
        assert view.faults() == {}
        after = colours(view)
        assert before[0] != after[0] and before[1] != after[1]
        assert view.messages == []


def test_figures_follow_the_width_and_keys_reach_what_scrolls(chromium: Browser, page: Path) -> None:
    with chromium.view(page, width=WIDTHS[0]) as view:
        view.set_width(WIDTHS[1])
        assert view.faults() == {}
        assert view.evaluate("[...document.querySelectorAll('.scroll, pre')].every(one => one.tabIndex === 0)")
        view.evaluate("document.querySelector('.scroll').focus({focusVisible: true})")
        assert view.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"


def test_heat_maps_change_their_scale_with_the_setting(chromium: Browser, page: Path) -> None:
    scale = "document.getElementById('figure-load-1-1').data[0].colorscale.map(one => one[1]).join()"
    with chromium.view(page) as view:
        light = view.evaluate(scale)
        view.set_scheme("dark")
        assert view.evaluate(scale) != light


BROKEN = """<!DOCTYPE html><html data-drawn="light"><body style="margin: 0">
<p style="margin: 0">first line of text</p><p style="margin: -19px 0 0">another one on top</p>
<div style="width: 40px; overflow: hidden; white-space: nowrap">a long text that is cut</div>
<div style="width: 2000px">wide</div><p style="color: #bbb">pale</p>
<script>console.log("hello")</script></body></html>"""


def test_a_broken_page_is_seen(chromium: Browser, tmp_path: Path) -> None:
    (tmp_path / "broken.html").write_text(BROKEN)
    with chromium.view(tmp_path / "broken.html", width=WIDTHS[1]) as view:
        assert set(view.faults()) == {"overlaps", "cut", "overflow", "contrast"}
        assert len(view.messages) == 1 and "hello" in view.messages[0]
