"""What commands print: tables that fit or become lists, and sizes that add up."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from sparsering.traces import output
from sparsering.traces.output import Table, offer_report, rounded_parts, say, show

TABLE = Table(
    title="candidates",
    columns=("", "layout", "step ms", "remarks"),
    rows=(
        ("→", "a hierarchical ring with prefetch", "1,234.5", "picked, plain"),
        ("", "ring", "9.1", ""),
    ),
    note="step: one layer",
    text=("layout", "remarks"),
)


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch):
    """Return a function that makes standard output pass for a terminal of a width, without colours."""

    def install(width: int) -> None:
        made = Console(
            width=width, force_terminal=True, no_color=True, color_system=None, highlight=False, markup=False
        )  # fmt: skip
        monkeypatch.setattr(output, "_console", lambda: made)

    return install


def test_a_pipe_gets_whole_rows(capsys: pytest.CaptureFixture[str]) -> None:
    show(TABLE)
    assert capsys.readouterr().out == (
        "candidates\n"
        "   layout                             step ms  remarks\n"
        "→  a hierarchical ring with prefetch  1,234.5  picked, plain\n"
        "   ring                                   9.1\n"
        "step: one layer\n"
    )


def test_words_are_wrapped_and_figures_are_not(terminal, capsys: pytest.CaptureFixture[str]) -> None:
    terminal(46)
    show(TABLE)
    assert capsys.readouterr().out.splitlines() == [
        "candidates",
        "   layout                     step ms  remarks",
        "─" * 46,
        "→  a hierarchical ring with   1,234.5  picked,",
        "   prefetch                            plain",
        "   ring                           9.1",
        "step: one layer",
    ]


def test_what_does_not_fit_becomes_a_list(terminal, capsys: pytest.CaptureFixture[str]) -> None:
    terminal(30)
    show(TABLE)
    lines = capsys.readouterr().out.splitlines()
    assert lines[1:6] == [
        "",
        "→",
        "layout   a hierarchical ring with prefetch",
        "step ms  1,234.5",
        "remarks  picked, plain",
    ]


@given(
    cells=st.lists(st.tuples(st.text("ab ", max_size=30), st.from_regex(r"[0-9]{1,9}", fullmatch=True)), max_size=5),
    room=st.integers(1, 90),
)
def test_no_row_is_wider_than_the_room_and_no_word_is_lost(cells: list[tuple[str, str]], room: int) -> None:
    table = Table(columns=("some words", "figure"), rows=cells, text=("some words",))
    widths = output._widths(table, room)
    if widths is None:
        assert table.narrowest(0) + output.GAP + table.narrowest(1) > room
        return
    assert sum(widths) + output.GAP <= room
    assert widths[0] >= table.narrowest(0) and widths[1] >= table.narrowest(1)


def test_prose_is_a_line_in_a_pipe_and_wrapped_between_words_on_a_terminal(
    terminal, capsys: pytest.CaptureFixture[str]
) -> None:
    paragraph = "one two three " * 20
    say(paragraph)
    assert capsys.readouterr().out == f"{paragraph}\n"
    terminal(40)
    say(paragraph, "[bold] is no markup", answer=True)
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 40
    assert shown.split() == [*paragraph.split(), "[bold]", "is", "no", "markup"]


def test_the_report_that_is_offered_can_be_pasted(capsys: pytest.CaptureFixture[str]) -> None:
    offer_report("my plan.json", "t.json.gz")
    assert capsys.readouterr().out == "see it: sparsering report 'my plan.json' t.json.gz -o report.html\n"


@given(st.dictionaries(st.text("abc", min_size=1), st.integers(0, 10**11), max_size=6), st.sampled_from([1e6, 1e9]))
def test_rounded_parts_add_up_and_each_is_near(sizes: dict[str, int], unit: float) -> None:
    parts = rounded_parts(sizes, unit)
    assert sum(parts.values()) == round(sum(sizes.values()) / unit)
    assert all(abs(parts[name] - size / unit) <= 1 for name, size in sizes.items())
