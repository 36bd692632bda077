"""The verb `validate`: measured results against predictions."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from ..traces.errors import InputError
from ..traces.files import open_regular
from ..traces.output import Table, say, show
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
    bounds, share = parse_tolerances(tolerance), finite_share(spread, "--spread")
    if report is not None:
        _require_report(report)
    read = read_comparisons(files, spread=share)
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
        with open_regular(path) as file:
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
    say(_answer(verdicts), answer=True)
    rows = []
    for name, verdict in verdicts.items():
        tau = "–" if verdict.tau is None else f"{verdict.tau:.3f} ({verdict.pairs})"
        regret = "–" if verdict.regret is None else f"{verdict.regret:.1%} ({len(verdict.choices)})"
        rows.append((name, *_cells(verdict.errors), tau, regret))
        if verdict.calibration is not None:
            rows.append((f"{name}, calibrated on", *_cells(verdict.calibration), "", ""))
    show(
        Table(
            title="predicted / measured - 1",
            columns=("", "rows", "median", "p95", "max", "bias", "tau", "regret"),
            rows=rows,
            note="median, p95, max: of the errors' sizes; bias: signed median; tau: order of alternatives (pairs); "
            "regret: largest (workloads)",
        )
    )
    places = sorted(errors_by_place(read.rows).items(), key=lambda item: -item[1].median)
    if places:
        worst = places[:SHOWN_PLACES]
        told = (f"{way} rank {rank} phase {phase} {one.bias:+.1%}".strip() for (way, rank, phase), one in worst)
        say(f"worst of {len(places)} (rank, phase): {'; '.join(told)}")
    if read.one_sided:
        say(f"left out: {read.one_sided} (rank, phase) that compute in one of two timelines only")


def _answer(verdicts: Mapping[Quantity, Verdict]) -> str:
    """Return one line: how far predictions are off, of the first quantity that was judged, and of how many rows."""
    judged = ((name, verdict.errors) for name, verdict in verdicts.items() if verdict.errors is not None)
    name, errors = next(judged, ("", None))
    if errors is None:
        return "Nothing can be judged: all rows were calibrated on."
    return (
        f"Predictions of {name} are off by {errors.median:.1%} in the median and {errors.max:.1%} at most, over "
        f"{errors.rows} measured rows."
    )


def _cells(errors: Errors | None) -> tuple[str, ...]:
    if errors is None:
        return "0", "–", "–", "–", "–"
    return (str(errors.rows), f"{errors.median:.1%}", f"{errors.p95:.1%}", f"{errors.max:.1%}", f"{errors.bias:+.1%}")
