"""Writes tables and drawing of docs/learning.md from the results of benchmarks/learning.py. `make measured` runs it.

Arms are compared with the dense arm of the same steps, seed, learning rate and held-out text, in the same study or in
one that differs from it in its arms alone; step times with the dense arm's in the same result file.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from table_cells import Column, number, table
from write_measured import RESULTS

DOCS = Path(__file__).resolve().parent
STUDIES = DOCS.parent / "benchmarks/studies"
PAGE, FIGURE = DOCS / "learning.md", DOCS / "figures/learning.svg"
BEGIN, END = "<!-- learning: begin -->\n", "<!-- learning: end -->\n"
SAME = ("base", "steps", "seed", "learning_rate", "heldout_digest")
FAR_TOKENS = 8192
INK, GRID, DENSE = "#243b53", "#bcccdc", "#9cc4e0"
COLORS = {"block-mass": "#b5651d", "xattention": "#2f6f9f", "vertical-slash": "#5a8f3c", "sink-window": "#777777"}

Row = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Compared:
    """One judged arm, and the dense one that it is compared with."""

    row: Row
    dense: Row
    step_ratio: float | None  # of step times, over the dense arm's in the same file

    @property
    def gap(self) -> float:
        """By how much of the dense arm's held-out loss this one's is higher."""
        return self.row["heldout_loss"] / self.dense["heldout_loss"] - 1

    @property
    def gap_attended_densely(self) -> float:
        """The same, of the arm's weights attended densely."""
        return (self.row["heldout_loss_dense"] or self.row["heldout_loss"]) / self.dense["heldout_loss"] - 1

    @property
    def worst_far_bucket(self) -> float:
        """The largest gap of any bucket of positions beyond 8K."""
        own, dense = (_buckets(one) for one in (self.row, self.dense))
        return max(own[first] / dense[first] - 1 for first in own if first >= FAR_TOKENS)

    def needle_points(self, question: str) -> float | None:
        """How many points of needles more are found than by the dense arm."""
        both = [one.get(f"needle_{question}") for one in (self.row, self.dense)]
        return None if None in both else 100 * (both[0] - both[1])  # pyright: ignore[reportOptionalOperand]


def _buckets(row: Row) -> dict[int, float]:
    arm = "dense" if row["selector"] == "dense" else "sparse"
    (its,) = (one for one in row["readings"] if (one["quantity"], one["arm"]) == ("loss", arm))
    return {one["first"]: one["mean"] for one in its["buckets"] if one["tokens"]}


def all_rows() -> list[Row]:
    """Return the rows of all result files, the oldest first; each with its file, its study, and what it ran on.

    base: what the study's file says between its question and its arms, the same for studies that can be compared.
    """
    rows: list[Row] = []
    for path in sorted(RESULTS.glob("eval-*.json"), key=lambda path: json.loads(path.read_text())["date"]):
        found = json.loads(path.read_text())
        (study,) = re.findall(r"studies/([\w-]+)\.yaml", found["command"])
        where = f"{found['hardware']['count']} × {found['hardware']['device']}"
        told = (STUDIES / f"{study}.yaml").read_text()
        base = told[told.index("\nmargins:") : told.index("\narms:")]
        rows += [row | {"study": study, "base": base, "file": path.name, "where": where} for row in found["rows"]]
    return rows


def compared(rows: Sequence[Row]) -> list[Compared]:
    """Return all judged arms that have a dense arm to be compared with, the densest first."""
    judged = [row for row in rows if row.get("heldout_loss") is not None]
    found = []
    for row in judged:
        dense = [one for one in judged if one["selector"] == "dense" and all(one[name] == row[name] for name in SAME)]
        if dense:
            found.append(Compared(row=row, dense=dense[-1], step_ratio=_step_ratio(row["arm"], row["study"], rows)))
    return sorted(found, key=lambda one: (one.row["learning_rate"], -(one.row["total_density"] or 1)))


def _step_ratio(arm: str, study: str, rows: Iterable[Row]) -> float | None:
    """Return the arm's step time over that of the dense one in the newest file that has timed both alone."""
    ratios: list[float] = []
    timed = [row for row in rows if "heldout_loss" not in row and row["study"] == study]
    for row in timed:
        dense = [one for one in timed if one["file"] == row["file"] and one["arm"] == "dense"]
        if row["arm"] == arm and dense:
            ratios.append(row["step_ms"] / dense[0]["step_ms"])
    return ratios[-1] if ratios else None


def _share(value: float) -> str:
    return f"{100 * value:.1f} %"


def _percent(value: float) -> str:
    return f"{100 * value:+.2f} %"


def arms_table(found: Sequence[Compared]) -> list[str]:
    """Return a line for every arm: whether it is quicker, its density, and what it loses."""

    def of(name: str) -> Any:
        return lambda row: number(row["of"].row.get(name), 4)

    def points(question: str) -> Any:
        return lambda row: "" if (got := row["of"].needle_points(question)) is None else f"{got:+.1f}"

    columns = [
        Column(heading="step time ÷ dense", cell=lambda row: _speed(row["of"])),
        Column(heading="arm", cell=lambda row: row["of"].row["arm"]),
        Column(heading="density, columns counted", cell=lambda row: _share(row["of"].row["total_density"] or 1)),
        Column(heading="learning rate", cell=lambda row: f"{row['of'].row['learning_rate']:g}"),
        Column(heading="steps", cell=lambda row: str(row["of"].row["steps"])),
        Column(heading="held-out loss", cell=of("heldout_loss")),
        Column(heading="against dense", cell=lambda row: _percent(row["of"].gap)),
        Column(heading="its weights attended densely", cell=lambda row: _percent(row["of"].gap_attended_densely)),
        Column(heading="worst bucket beyond 8K", cell=lambda row: _percent(row["of"].worst_far_bucket)),
        Column(heading="needles last, points", cell=points("last")),
        Column(heading="needles mid, points", cell=points("mid")),
        Column(heading="file", cell=lambda row: f"`{row['of'].row['file']}`"),
    ]  # fmt: skip
    return table(columns, [{"of": one} for one in found])


def _speed(one: Compared) -> str:
    if one.row["selector"] == "dense":
        return "1.00"
    if one.step_ratio is None:
        return "not timed alone"
    return f"{one.step_ratio:.2f}" + (" **slower than dense**" if one.step_ratio > 1 else "")


def figure(found: Sequence[Compared]) -> str:
    """Return the frontier as a drawing: loss against dense over density, a point an arm."""
    width, height, left, bottom = 640, 320, 70, 50
    points = [one for one in found if one.row["selector"] != "dense"]
    most = max([0.02, *(one.gap for one in points)]) * 1.1
    least = min([-0.005, *(one.gap for one in points)]) * 1.1
    widest = max([0.25, *(one.row["total_density"] for one in points)])

    def at(density: float, gap: float) -> tuple[float, float]:
        share = (gap - least) / (most - least)
        return left + (width - left - 20) * density / widest, 20 + (height - bottom - 20) * (1 - share)

    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif">']
    for gap in (0.0, 0.005, 0.01, 0.02, 0.05):
        if least <= gap <= most:
            _, y = at(0, gap)
            parts.append(f'<path d="M{left} {y:.1f}H{width - 20}" stroke="{DENSE if gap == 0 else GRID}"/>')
            parts.append(_text(left - 8, y + 4, f"{100 * gap:+.1f} %", "end"))
    for share in (0.0, 0.05, 0.1, 0.15, 0.2, 0.25):
        if share <= widest:
            parts.append(_text(at(share, least)[0], height - bottom + 18, f"{100 * share:.0f} %", "middle"))
    parts.append(_text(width / 2, height - 12, "density, columns counted", "middle"))
    parts.append(_text(left, 14, "held-out loss against dense", "start"))
    for one in points:
        x, y = at(one.row["total_density"], one.gap)
        color = COLORS.get(one.row["selector"], INK)
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="{color}"/>')
        parts.append(_text(x + 8, y + 4, one.row["arm"], "start"))
    return "\n".join([*parts, "</svg>", ""])


def _text(x: float, y: float, content: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="12" text-anchor="{anchor}" fill="{INK}">{content}</text>'


def rendered(found: Sequence[Compared]) -> str:
    """Return what belongs between the marks of the page: a table of all studies that can be compared."""
    parts: list[str] = []
    for base in sorted({one.row["base"] for one in found}):
        its = [one for one in found if one.row["base"] == base]
        studies = ", ".join(f"`{name}`" for name in sorted({one.row["study"] for one in its}))
        where = ", ".join(sorted({one.row["where"] for one in its}))
        parts += [f"### {studies}", "", f"On {where}.", "", *arms_table(its), ""]
    return "\n" + "\n".join(parts)


def drawn(found: Sequence[Compared]) -> str:
    """Return the frontier of the arms that were trained for longest."""
    longest = max((one.row["steps"] for one in found), default=0)
    return figure([one for one in found if one.row["steps"] == longest])


def main() -> None:
    """Rewrite what stands between the marks, and the drawing."""
    found = compared(all_rows())
    before, _, rest = PAGE.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(f"{before}{BEGIN}{rendered(found)}{END}{after}")
    if found:
        FIGURE.write_text(drawn(found))


if __name__ == "__main__":
    main()
