"""What commands print for people: an answer, prose, and tables that fit any terminal; whole lines in a pipe.

On a terminal prose is wrapped between words, and a table whose columns do not fit side by side is written as one small
list for each row: nothing is ever cut. Where standard output is no terminal there are no escape codes, a paragraph is a
line and a row of a table is a line.
"""

from __future__ import annotations

import shlex
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from pathlib import Path
from textwrap import wrap

from rich.console import Console

from .errors import printable

GAP = 2  # characters between columns


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of cells under named columns, most of them figures, which stand to the right.

    text: names of the columns that hold words and may be wrapped; one without a name is among them.
    note: what names of columns mean, printed below.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""
    note: str = ""
    text: Collection[str] = field(default=())

    def holds_words(self, column: int) -> bool:
        """Whether a column's cells are words rather than figures."""
        return self.columns[column] == "" or self.columns[column] in self.text

    def narrowest(self, column: int) -> int:
        """Return the characters that a column needs: its longest figure, or its longest word."""
        cells = [row[column] for row in self.rows]
        parts = [word for cell in cells for word in cell.split()] if self.holds_words(column) else cells
        return max(map(len, [*parts, *self.columns[column].split(), ""]))


def say(*paragraphs: str, answer: bool = False) -> None:
    """Print paragraphs to standard output. answer: what the command found, which stands out on a terminal."""
    console = _console()
    for paragraph in map(printable, paragraphs):
        if console.is_terminal:
            console.print(paragraph, style="bold" if answer else None)
        else:
            print(paragraph)


def show(table: Table) -> None:
    """Print a table to standard output, whole."""
    table = replace(table, rows=[[printable(cell) for cell in row] for row in table.rows])
    console = _console()
    room = console.width if console.is_terminal else None
    if table.title:
        say(table.title)
    widths = _widths(table, room)
    if widths is None:
        _print_lists(table)
    else:
        _print_columns(table, widths, underlined=console.is_terminal)
    if table.note:
        say(table.note)


def offer_report(*paths: Path | str) -> None:
    """Print the command that shows these files or folders as a page."""
    say(f"see it: sparsering report {shlex.join(map(str, paths))} -o report.html")


def rounded_parts(sizes: Mapping[str, int], unit: float) -> dict[str, int]:
    """Return sizes in whole units that add up to their rounded sum: the largest remainders are rounded up."""
    whole = {name: int(size // unit) for name, size in sizes.items()}
    missing = round(sum(sizes.values()) / unit) - sum(whole.values())
    for name in sorted(sizes, key=lambda one: whole[one] - sizes[one] / unit)[:missing]:
        whole[name] += 1
    return whole


def _console() -> Console:
    return Console(highlight=False, markup=False, emoji=False)


def _widths(table: Table, room: int | None) -> list[int] | None:
    """Return the characters of each column within `room`, None: without limit; None where there is too little.

    What is left beside the narrowest columns goes to those of words, the first of them first.
    """
    columns = range(len(table.columns))
    widest = [max(len(cell) for cell in (table.columns[n], *(row[n] for row in table.rows))) for n in columns]
    if room is None:
        return widest
    widths = [table.narrowest(column) for column in columns]
    left = room - sum(widths) - GAP * (len(widths) - 1)
    if left < 0:
        return None
    for column in columns:
        if table.holds_words(column):
            given = min(left, widest[column] - widths[column])
            widths[column] += given
            left -= given
    return widths


def _print_columns(table: Table, widths: Sequence[int], *, underlined: bool) -> None:
    """Print rows with their columns under each other; a cell that is too wide goes on in the next line."""
    for number, row in enumerate([table.columns, *table.rows]):
        cells = [wrap(cell, max(width, 1)) or [""] for cell, width in zip(row, widths, strict=True)]
        for line in zip_longest(*cells, fillvalue=""):
            placed = (
                text.ljust(width) if table.holds_words(column) else text.rjust(width)
                for column, (text, width) in enumerate(zip(line, widths, strict=True))
            )
            print((" " * GAP).join(placed).rstrip())
        if number == 0 and underlined:
            print("─" * (sum(widths) + GAP * (len(widths) - 1)))


def _print_lists(table: Table) -> None:
    """Print every row as lines of a column's name and its cell, where the columns need more than the width."""
    width = max(map(len, table.columns))
    for row in table.rows:
        cells = zip(table.columns, row, strict=True)
        print("\n".join(["", *(f"{name:<{width}}  {cell}".strip() for name, cell in cells if cell)]))
    print()
