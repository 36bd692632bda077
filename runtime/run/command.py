"""The verb `run`: execute a plan on real processes and measure it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from ...planner.plan import Plan, load_plan
from ...planner.replay import Recorded, find_trace, recorded_layer
from ...traces.files import remove_partials
from ...traces.timeline import Timeline


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
    from ..comm.lost import RankLost  # torch is imported when ranks are run, not when the verb is listed
    from ..comm.mesh import check_patience, inherited_environment, is_rank, join
    from ..comm.start import start_ranks
    from .execute import RunOptions
    from .rank import crowded, report, require_devices, require_kernels, run_rank

    if output is not None:
        Timeline.require_writable(output)
    loaded = load_plan(plan)
    recorded = _replayed(loaded, plan, trace, training_step, layer)
    pattern, number = (recorded.pattern, recorded.layer) if recorded is not None else (None, layer or 0)
    options = RunOptions(repeats=repeats, warmups=warmups, verify=verify, seed=seed, layer=number)
    require_kernels(loaded, plan, device=device)
    if not is_rank():
        require_devices(loaded, device=device)
        check_patience(patience_s, timeout_s)
        if (warning := crowded(loaded.world_size, device=device)) is not None:
            typer.echo(f"warning: {plan}: {warning}", err=True)
        environment = inherited_environment(world_size=loaded.world_size)
        try:
            code = start_ranks(sys.argv[1:], world_size=loaded.world_size, environment=environment)
        finally:
            if output is not None:
                remove_partials(output)  # of a rank that was ended while it wrote
        raise typer.Exit(code)
    try:
        mesh = join(device=device, timeout_s=timeout_s, patience_s=patience_s)
        passed = run_rank(mesh, loaded, pattern, options, lambda result: report(loaded, result, output, as_json))
    except RankLost as error:
        typer.echo(f"sparsering: {error}", err=True)
        raise typer.Exit(1) from error
    raise typer.Exit(0 if passed else 1)


def _replayed(
    plan: Plan, path: Path, trace: Path | None, training_step: int | None, layer: int | None
) -> Recorded | None:
    if plan.pattern.source == "choose" and trace is None:
        return None
    recorded = recorded_layer(find_trace(plan, path, trace), training_step, layer)
    plan.require(seq_len_tokens=recorded.pattern.seq_len_tokens)
    return recorded
