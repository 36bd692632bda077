"""The verb `validate`: measured results against predictions."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from ..traces.errors import InputError
from .comparisons import Comparisons, Quantity, finite_share, read_comparisons
from .validate import Errors, Verdict, errors_by_place, judge, parse_tolerances

SHOWN_PLACES = 8
SPREAD = "0.01"


def validate(
    files: Annotated[
        list[Path],
        typer.Argument(help="Result files of benchmarks (ring, rank, fidelity, phases); timelines of both sources."),
    ],
    tolerance: Annotated[
        str, typer.Option(help="As step=0.03,step.p95=0.08,memory.max=0.05,step.tau=0.9,step.regret=0.02.")
    ] = "",
    spread: Annotated[str, typer.Option(help="Relative spread of repeats, of rows that state none.")] = SPREAD,
    report: Annotated[Path | None, typer.Option(help="Write a page with a scatter plot here (.html).")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Set measured times and memory beside what was predicted; exit code 1 where a stated tolerance is missed.

    An error is predicted / measured - 1; a tolerance names a quantity (forward, backward, step, memory, phase) and
    median (or nothing), p95, max, bias, regret, which it bounds from above, or tau, from below. Rows marked as
    calibration are counted apart. Timelines are matched by their plan.
    """
    bounds = parse_tolerances(tolerance)
    read = read_comparisons(files, spread=finite_share(spread, "--spread"))
    if report is not None:
        _require_report(report)
    verdicts = judge(read.rows)
    missed = [line for line in (bound.missed(verdicts) for bound in bounds) if line is not None]
    if report is not None:
        from .report.fidelity import write_fidelity_page  # plotly and jinja2 only where a page is wanted

        write_fidelity_page(report, read.rows, verdicts, missed)
    if as_json:
        typer.echo(json.dumps(_document(read, verdicts, missed)))
    else:
        _show(read, verdicts)
    for line in missed:
        typer.echo(f"missed: {line}", err=True)
    if missed:
        raise typer.Exit(1)


def _require_report(path: Path) -> None:
    from .report.fidelity import TITLE

    if path.suffix != ".html":
        raise InputError("must end in .html", source=path)
    if path.is_dir() or (path.exists() and path.stat().st_size and TITLE not in _beginning(path)):
        raise InputError("exists and is no page of `validate`: it is not overwritten", source=path)


def _beginning(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return file.read(1000).decode(errors="replace")
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", source=path) from error


def _document(read: Comparisons, verdicts: Mapping[Quantity, Verdict], missed: Sequence[str]) -> dict[str, Any]:
    places = [
        {"direction": direction or None, "rank": rank, "phase": phase} | asdict(errors)
        for (direction, rank, phase), errors in errors_by_place(read.rows).items()
    ]
    return {
        "quantities": {name: asdict(verdict) | {"regret": verdict.regret} for name, verdict in verdicts.items()},
        "phases": places,
        "one_sided_phases": read.one_sided,
        "missed": list(missed),
    }


def _show(read: Comparisons, verdicts: Mapping[Quantity, Verdict]) -> None:
    console = Console(highlight=False, markup=False)
    table = Table(box=SIMPLE_HEAD, pad_edge=False, title="predicted / measured - 1")
    for name in ("", "rows", "median", "p95", "max", "bias", "tau", "regret"):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    for name, verdict in verdicts.items():
        tau = "–" if verdict.tau is None else f"{verdict.tau:.3f} ({verdict.pairs})"
        regret = "–" if verdict.regret is None else f"{verdict.regret:.1%} ({len(verdict.choices)})"
        table.add_row(name, *_cells(verdict.errors), tau, regret)
        if verdict.calibration is not None:
            table.add_row(f"{name}, calibrated on", *_cells(verdict.calibration), "", "")
    table.caption = "bias: signed median; tau: order of alternatives (pairs); regret: largest (workloads)"
    console.print(table)
    places = sorted(errors_by_place(read.rows).items(), key=lambda item: -item[1].median)
    if places:
        worst = places[:SHOWN_PLACES]
        told = (f"{way} rank {rank} phase {phase} {one.bias:+.1%}".strip() for (way, rank, phase), one in worst)
        console.print(f"worst of {len(places)} (rank, phase): {'; '.join(told)}")
    if read.one_sided:
        console.print(f"left out: {read.one_sided} (rank, phase) that compute in one of two timelines only")


def _cells(errors: Errors | None) -> tuple[str, ...]:
    if errors is None:
        return "0", "–", "–", "–", "–"
    return (str(errors.rows), f"{errors.median:.1%}", f"{errors.p95:.1%}", f"{errors.max:.1%}", f"{errors.bias:+.1%}")
