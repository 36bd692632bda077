"""The verb `sparsering demo`: the whole road on this machine, without a GPU and without a network."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from ...traces.errors import InputError
from ...traces.output import offer_report
from .folder import CONTENT, PLAN_CLUSTER, PLAN_LOCAL, REPORT, replaced_folder, require_replaceable

LEAST_SEQ_LEN = 1024


def demo(
    context: typer.Context,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder to write; an earlier demo's is replaced.")
    ] = Path("demo-out"),
    seed: Annotated[int, typer.Option(min=0, help="Of the weights, the training windows and the run's tensors.")] = 0,
    seq_len: Annotated[int, typer.Option(min=LEAST_SEQ_LEN, help="Tokens to capture.")] = 8192,
    train_seconds: Annotated[float, typer.Option(min=0.1, help="Train for no longer than this.")] = 40.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the metrics as one JSON document.")] = False,
) -> None:
    """Train a small model, capture it, plan, simulate, run and verify: about two minutes on two cores, no GPU.

    Writes trace/, two plans, the simulated and the measured timeline, metrics.json and report.html. Exit code 1 when
    the run does not agree with the reference.
    """
    require_replaceable(output)
    if seq_len % 64:
        raise InputError(f"is {seq_len}, must be a multiple of 64", field="--seq-len")

    from .demo import Demo, run_demo

    services = dict(context.obj)  # what is missing here is missed now, not in two minutes
    with replaced_folder(output) as folder:
        metrics = run_demo(Demo(
            folder=folder, seq_len_tokens=seq_len, train_seconds=train_seconds, seed=seed, services=services,
            command=shlex.join(["sparsering", *sys.argv[1:]]),
        ))  # fmt: skip
        missing = [name for name in CONTENT if not (folder / name).exists()]
        assert not missing, missing
    if as_json:
        typer.echo(json.dumps({"output": str(output)} | metrics))
    else:
        _show(output, metrics)
    raise typer.Exit(0 if metrics["verified"] else 1)


def _show(output: Path, metrics: dict[str, Any]) -> None:
    console = Console(highlight=False)
    times = metrics["step_time_us"]
    for name, where in ((PLAN_CLUSTER, "32 A100s"), (PLAN_LOCAL, "4 local workers")):
        console.print(f"[bold]{where}:[/bold] {escape(metrics['plans'][name]['predictions']['verdict'])}")
    simulated, measured = (f"{name} {times[name] / 1e3:,.0f} ms" for name in ("simulated", "measured"))
    console.print(f"One layer, forward and backward: {simulated}, {measured}.")
    checked = ", ".join(sorted({one["name"] for one in metrics["verification"]}))
    worst = max((one["error"] for one in metrics["verification"]), default=float("nan"))
    if metrics["verified"]:
        console.print(f"[green]Verified[/green] in float64 on every rank: {checked}; largest error {worst:.1e}.")
    else:
        console.print(f"[red]The run does not agree with the reference[/red]: largest error {worst:.1e}.")
    console.print(f"Report: {escape(str(output / REPORT))}", soft_wrap=True)
    offer_report(output)
