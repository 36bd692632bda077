"""The verb `run`: execute a plan on real processes and measure it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from ...planner.plan import Plan, load_plan
from ...planner.replay import Recorded, find_trace, recorded_layer
from ...traces.errors import InputError
from ...traces.pattern import LayerPattern
from ...traces.timeline import Timeline
from ..comm.lost import RankLost
from ..comm.mesh import Mesh, inherited_environment, is_rank, join, leave, naming_lost_ranks
from ..comm.start import start_ranks
from .execute import RunOptions, RunResult, execute


def run(
    plan: Annotated[Path, typer.Argument(help="The plan file.")],
    trace: Annotated[
        Path | None, typer.Option(help="Its patterns are replayed; default: the plan's own, beside it.")
    ] = None,
    layer: Annotated[int | None, typer.Option(help="Layer of the trace; default: the middle one recorded.")] = None,
    training_step: Annotated[int | None, typer.Option("--step", help="Training step; default: the last.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Where the timeline goes (.json.gz).")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Measured repeats; the median's timeline is kept.")] = 3,
    warmups: Annotated[int, typer.Option(min=0, help="Repeats before measuring.")] = 1,
    verify: Annotated[bool, typer.Option(help="Check out, lse and all gradients in float64 on every rank.")] = False,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default: cuda where there is one.")] = None,
    timeout_s: Annotated[float, typer.Option(min=1.0, help="How long a rank waits for the others.")] = 600.0,
    patience_s: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            help="After how long a silence a rank is lost; 0: torch's own time-outs decide. Default: half of "
            "--timeout-s on GPUs; 0 on CPUs, where gloo notices a death at once.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the random q, k, v and gradient.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print figures as JSON.")] = False,
) -> None:
    """Execute one layer of a plan, forward and backward, on real processes, and measure its timeline.

    Joins the other ranks when RANK is set (torchrun); otherwise starts all ranks on this host. Exit code 1 when
    --verify finds an error too large, or ranks are lost.
    """
    if output is not None:
        Timeline.require_writable(output)
    loaded = load_plan(plan)
    recorded = _replayed(loaded, plan, trace, training_step, layer)
    pattern, number = (recorded.pattern, recorded.layer) if recorded is not None else (None, layer or 0)
    options = RunOptions(repeats=repeats, warmups=warmups, verify=verify, seed=seed, layer=number)
    if not is_rank():
        _require_devices(device, loaded.world_size)
        environment = inherited_environment(world_size=loaded.world_size)
        raise typer.Exit(start_ranks(sys.argv[1:], world_size=loaded.world_size, environment=environment))
    mesh = join(device=device, timeout_s=timeout_s, patience_s=patience_s)
    try:
        passed = _run_rank(mesh, loaded, pattern, options, lambda result: _report(loaded, result, output, as_json))
    except RankLost as error:
        typer.echo(f"sparsering: {error}", err=True)
        raise typer.Exit(1) from error
    raise typer.Exit(0 if passed else 1)


def _run_rank(
    mesh: Mesh, plan: Plan, pattern: LayerPattern | None, options: RunOptions, report: Callable[[RunResult], None]
) -> bool:
    """Execute the plan as one rank; rank 0 reports. Return, on all ranks, whether all verdicts are good."""
    console = Console(stderr=True, quiet=bool(mesh.rank))
    try:
        with naming_lost_ranks(mesh):
            with console.status("starting") as status:
                result = execute(plan, mesh, pattern, options, lambda text: status.update(text))
            if result is not None:
                report(result)
            return mesh.broadcast("verified", result is None or all(v.ok for v in result.verdicts))
    finally:
        leave()


def _require_devices(device: str | None, ranks: int) -> None:
    """Refuse once what every rank that is started on this host would refuse: InputError names the device."""
    if device not in (None, "cpu", "cuda"):
        raise InputError(f"{device!r} is neither 'cpu' nor 'cuda'", field="device")
    gpus = torch.cuda.device_count()
    if device == "cuda" and gpus < ranks:
        raise InputError(f"the plan is for {ranks} ranks, this host has {gpus} GPUs", field="device")


def _replayed(
    plan: Plan, path: Path, trace: Path | None, training_step: int | None, layer: int | None
) -> Recorded | None:
    if plan.pattern.source == "choose" and trace is None:
        return None
    recorded = recorded_layer(find_trace(plan, path, trace), training_step, layer)
    plan.require(seq_len_tokens=recorded.pattern.seq_len_tokens)
    return recorded


def _report(plan: Plan, result: RunResult, output: Path | None, as_json: bool) -> None:
    if output is not None:
        result.timeline.save(output)
    summary = result.summary()
    if as_json:
        typer.echo(json.dumps(summary | {"plan_digest": plan.digest}))
        return
    title = f"{plan.forward.layout} over {plan.world_size} ranks, {plan.placement.name} placement"
    table = Table("", "figure", title=title)
    table.add_row("step time (median), µs", f"{summary['step_time_us']:.0f}")
    if summary["peak_bytes"]:
        table.add_row("peak memory, bytes", str(summary["peak_bytes"]))
    for name in dict.fromkeys(verdict.name for verdict in result.verdicts):
        worst = max((v for v in result.verdicts if v.name == name), key=lambda v: v.error / max(v.tolerance, 1e-300))
        mark = "ok" if worst.ok else "FAILED"
        table.add_row(f"{name}, largest error", f"{worst.error:.2e} (allowed {worst.tolerance:.2e}) {mark}")
    Console().print(table)
