"""Training runs and the results of benchmarks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..answer import Saving
from ..figures.training import LOSS, SPEED, curve_figure, run_colours
from ..training import TrainingRun, run_rows
from .part import Part, drawing

MOST_RESULT_ROWS = 40
MOST_RESULT_COLUMNS = 14
MOST_FILES = 12


def training_part(runs: Sequence[TrainingRun], saving: Saving | None, planned_steps: int | None) -> Part | None:
    """Return speed, loss and GPU-hours of training runs."""
    if not runs:
        return None
    curves = [
        {"title": curve.title, "figure": drawing(name, curve_figure(runs, curve), f"{curve.title} by optimizer step")}
        for name, curve in (("speed", SPEED), ("loss", LOSS))
        if any(getattr(line, curve.field) is not None for run in runs for line in run.lines)
    ]
    legend = list(zip([run.name for run in runs], run_colours(runs), strict=True))
    values = {"rows": run_rows(runs), "curves": curves, "legend": legend, "saving": saving, "planned": planned_steps}
    return Part(template="training", title="Training: speed, loss and GPU-hours", values=values)


def results_part(results: Sequence[tuple[Path, Mapping[str, Any]]]) -> Part | None:
    """Return the rows of benchmarks' result files as tables, cut where they are long."""
    tables = [_table(path, document) for path, document in results[:MOST_FILES]]
    tables = [table for table in tables if table["rows"]]
    if not tables:
        return None
    return Part(template="results", title="Results of benchmarks",
                values={"tables": tables, "left_out": max(0, len(results) - MOST_FILES)})  # fmt: skip


def _table(path: Path, document: Mapping[str, Any]) -> dict[str, Any]:
    rows = [row for row in document["rows"] if isinstance(row, dict)]
    names = dict.fromkeys(name for row in rows for name, value in row.items() if not isinstance(value, dict | list))
    # Columns that are the same in all rows say nothing that tells rows apart: they stand above the table.
    same = {name: rows[0].get(name) for name in names if len(rows) > 1 and len({str(r.get(name)) for r in rows}) == 1}
    columns = [name for name in names if name not in same]
    hardware = document.get("hardware") if isinstance(document.get("hardware"), dict) else {}
    return {
        "file": path.name,
        "benchmark": str(document["benchmark"]),
        "hardware": ", ".join(f"{value}" for value in (hardware or {}).values() if isinstance(value, str)),
        "date": str(document.get("date", ""))[:10],
        "columns": columns[:MOST_RESULT_COLUMNS],
        "same": [(name, _shown(value)) for name, value in same.items() if value is not None],
        "rows": [[_shown(row.get(name)) for name in columns[:MOST_RESULT_COLUMNS]] for row in rows[:MOST_RESULT_ROWS]],
        "left_out": _left_out(len(rows), columns),
    }


def _left_out(rows: int, columns: Sequence[str]) -> list[str]:
    """Return in words what a table does not show."""
    told = [f"{rows - MOST_RESULT_ROWS} rows"] if rows > MOST_RESULT_ROWS else []
    rest = columns[MOST_RESULT_COLUMNS:]
    return told + ([f"columns {', '.join(rest)}"] if rest else [])


def _shown(value: object) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return str(value)[:60]
