"""The demo's page: the report on its folder, and what only the demo knows: the verified run, what to do next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...traces.files import read_json, write_atomically
from .inputs import read_inputs
from .page import report_html
from .parts.assemble import make_report

TEMPLATE = "demo.html"
METRICS = "metrics.json"
PAGE = "report.html"


def write_report(folder: Path) -> None:
    """Write `folder`/report.html from the demo's other files in `folder`. InputError when one cannot be read."""
    metrics = read_json(folder / METRICS)
    inputs = read_inputs([folder], output=folder / PAGE)
    # The folder is still to be moved into its place: files are named as they lie in it.
    inputs.sources = [replace(source, path=source.path.relative_to(folder)) for source in inputs.sources]
    verification = worst_errors(metrics["verification"])
    page = report_html(
        inputs,
        make_report(inputs),
        template=TEMPLATE,
        metrics=metrics,
        worst_error=max((one["error"] for one in metrics["verification"]), default=0.0),
        directions=_compared(metrics),
        verification=verification,
    )
    write_atomically(folder / PAGE, page.encode())


def worst_errors(verdicts: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return one row per verified tensor: its largest error over all ranks and whether every rank passed."""
    rows = []
    for name in dict.fromkeys(one["name"] for one in verdicts):
        own = [one for one in verdicts if one["name"] == name]
        worst = max(own, key=lambda one: one["error"])
        rest = {"tolerance": min(one["tolerance"] for one in own), "ok": all(one["ok"] for one in own)}
        rows.append({"name": name, "error": worst["error"], "rank": worst["rank"], "ranks": len(own), **rest})
    return rows


def _compared(metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the simulated and the measured figures of each direction, phase by phase."""
    measured = {one["direction"]: one for one in metrics["measured"]}
    compared = []
    for simulated in metrics["simulated"]:
        other = measured[simulated["direction"]]
        phases = [
            {"phase": a["phase"], "simulated": a, "measured": b}
            for a, b in zip(simulated["phases"], other["phases"], strict=False)
        ]
        ratio = simulated["makespan_us"] / other["makespan_us"] - 1.0
        compared.append({"simulated": simulated, "measured": other, "phases": phases, "off": ratio})
    return compared
