"""Cells and columns of the tables that write_measured.py and write_learning.py make of results."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Row = Mapping[str, Any]
Cell = Callable[[Row], str]


@dataclass(frozen=True, kw_only=True)
class Column:
    """One column of a table: its heading, and what a row says there; "" where the row says nothing."""

    heading: str
    cell: Cell


def number(value: float | None, digits: int = 3) -> str:
    """Return a number with so many significant digits, whole above that; "" for none."""
    if value is None:
        return ""
    places = digits - 1 if value == 0 else digits - 1 - int(f"{abs(value):e}".partition("e")[2])
    return f"{value:,.{max(places, 0)}f}"


def plain(name: str) -> Cell:
    """Return a cell that shows a field as it is."""
    return lambda row: "" if row.get(name) is None else str(row[name])


def measured(name: str, *, scale: float = 1.0) -> Cell:
    """Return a cell that shows a number, times `scale`."""
    return lambda row: number(None if row.get(name) is None else row[name] * scale)


def percent(name: str) -> Cell:
    """Return a cell that shows a share as per cent."""
    return lambda row: "" if row.get(name) is None else f"{number(100 * row[name], 2)} %"


def ratio(top: Callable[[Row], float | None], bottom: Callable[[Row], float | None]) -> Cell:
    """Return a cell that shows one number of a row over another, where it has both."""

    def cell(row: Row) -> str:
        above, below = top(row), bottom(row)
        return f"{above / below:.2f}" if above and below else ""

    return cell


def tokens(row: Row) -> str:
    """Return the sequence length, in units of 1,024 tokens."""
    return f"{row['seq_len'] // 1024}K"


def layer_ms(row: Row) -> float:
    """Return forward and backward of one layer: in one go where that was measured, else their sum."""
    return row.get("step_ms") or row["forward_ms"] + row["backward_ms"]


def kernels_alone_ms(row: Row) -> float | None:
    """Return what the slowest rank's launches take with nothing sent."""
    return row.get("compute_step_ms" if "step_ms" in row else "compute_ms") or row.get("compute_step_ms")


def predicted_ms(row: Row) -> float | None:
    """Return what the simulator says of the layer."""
    return row["predicted_forward_ms"] + row["predicted_backward_ms"] if "predicted_forward_ms" in row else None


def quickest(rows: Sequence[Row], same: Sequence[str], time: Callable[[Row], float]) -> Cell:
    """Return a cell that shows a row's time over that of the quickest row that is the same in the fields `same`."""
    best: dict[tuple[Any, ...], float] = {}
    for row in rows:
        key = tuple(row.get(name) for name in same)
        best[key] = min(time(row), best.get(key, time(row)))
    return lambda row: f"{time(row) / best[tuple(row.get(name) for name in same)]:.2f}"


def table(columns: Sequence[Column], rows: Sequence[Row]) -> list[str]:
    """Return a Markdown table, without the columns in which no row says anything."""
    kept = [column for column in columns if any(column.cell(row) for row in rows)]
    head = "| " + " | ".join(column.heading for column in kept) + " |"
    lines = ("| " + " | ".join(column.cell(row) for column in kept) + " |" for row in rows)
    return [head, "|" + "---|" * len(kept), *lines]
