"""The verb `sparsering estimate`: seconds a step, tokens a second, memory and GPU-hours before anything is started."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ....planner.chosen_cluster import chosen_cluster
from ....planner.cost.cluster import preset_names
from ....traces.dataset.store import Trace
from ....traces.progress import shown_progress
from ..config import TrainConfig, load_config

if TYPE_CHECKING:
    from .run import Arm, RunEstimate

UNVALIDATED = "unvalidated: rates of data sheets, and shares of them that were measured on other machines"
MEASURED = "from rates measured on this cluster's GPUs"


def estimate(
    context: typer.Context,
    config: Annotated[Path, typer.Argument(help="The run's YAML file, as `sparsering train` takes it.")],
    cluster: Annotated[str, typer.Option(help=f"Where it will run: a YAML file or {', '.join(preset_names())}.")],
    trace: Annotated[
        Path | None, typer.Option(help="Patterns that the run is expected to choose, captured at its length.")
    ] = None,
    layers: Annotated[int, typer.Option(min=1, help="Simulate at most so many recorded layers.")] = 4,
    choosing_ms: Annotated[
        float, typer.Option(min=0.0, help="What choosing patterns takes a layer, where you measured it.")
    ] = 0.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print figures as JSON.")] = False,
) -> None:
    """Say what a training run will take on a cluster: a step part by part, beside the same with dense attention.

    Needs the model's configuration, no weights, no data and no GPU (needs torch). Attention is simulated; the layers
    around it, the loss, the optimizer and sharded parameters come from the cluster's rates. docs/predictions.md says
    how far such estimates were off. Exit code 2 and one line for what has no prices (experts).
    """
    found = estimated(context, load_config(config), cluster, trace, layers=layers, choosing_us=choosing_ms * 1e3)
    if as_json:
        typer.echo(json.dumps(found.to_json()))
        return
    for line in told_estimate(found):
        typer.echo(line)


def estimated(
    context: typer.Context, config: TrainConfig, cluster: str, trace: Path | None, *, layers: int = 4,
    choosing_us: float = 0.0,
) -> RunEstimate:  # fmt: skip
    """Estimate a run as the options of a verb say. context: of the command line, which knows the simulator."""
    from .run import estimate_run  # torch is imported to estimate, not to list the verb

    with shown_progress() as progress:
        return estimate_run(
            config, chosen_cluster(cluster), context.obj["simulate_plan"],
            trace=None if trace is None else Trace.open(trace), most_layers=layers, choosing_us=choosing_us,
            progress=progress,
        )  # fmt: skip


def told_estimate(found: RunEstimate) -> list[str]:
    """Return the answer, the parts of a step, and what they rest on; no line is wider than 80 columns."""
    config, arms = found.config, found.arms
    ranks = config.parallel.world_size
    first = arms[0]
    answer = f"{_seconds(first.step.us)} a step on {ranks} GPUs of {found.cluster.name}"
    if len(arms) == 2:
        answer += f": {arms[1].step.us / first.step.us:.2f} times as quick as dense attention"
    rows = [("", *(arm.name for arm in arms))]
    for name in dict.fromkeys(part.name for arm in arms for part in arm.step.parts):
        rows.append((name, *(_part(arm, name) for arm in arms)))
    rows += [
        ("step", *(_seconds(arm.step.us) for arm in arms)),
        ("tokens a second", *(f"{arm.step.tokens_per_s:,.0f}" for arm in arms)),
        (f"GPU-hours of {config.steps:,} steps",
         *(f"{arm.step.gpu_hours(steps=config.steps, ranks=ranks):,.1f}" for arm in arms)),
        ("memory of a rank, of it", *(_gib(arm.memory_bytes["total"]) for arm in arms)),
        *((f"  {name.replace('_', ' ')}", *(_gib(arm.memory_bytes[name]) for arm in arms))
          for name in first.memory_bytes if name != "total"),
        ("memory of a GPU", *(_gib(found.cluster.gpu.memory_bytes) for _ in arms)),
    ]  # fmt: skip
    table = [f"{row[0]:32}" + "".join(f"{cell:>22}" for cell in row[1:]) for row in rows]
    return [answer, "", *table, "", *_notes(found)]


def _notes(found: RunEstimate) -> list[str]:
    first = found.arms[0]
    notes = [MEASURED if found.cluster.origin == "measured" else UNVALIDATED]
    if found.configured is not found.dense:
        shown = ", ".join(map(str, first.layer.layers))
        notes.append(f"attention: layers {shown} simulated; they differ by {first.layer.spread:.0%} of their mean")
        if not any(part.name == "choosing patterns" for part in first.step.parts):
            notes.append("choosing patterns is left out: give --choosing-ms where you measured it")
        choose, steps = found.config.plan.choose, found.config.steps
        if not choose.always:
            notes.append(f"patterns are chosen in {choose.choosing_steps(steps):,} of {steps:,} steps")
        if dense_steps := choose.dense_steps(steps):
            notes.append(f"{dense_steps:,} of {steps:,} steps are dense, which the times of the others say nothing of")
    gpu = found.cluster.gpu
    if gpu.dense_forward_efficiency is None:
        notes.append("dense attention is priced as the sparse kernels: the cluster says no rate of its own")
    for arm in found.arms:
        if arm.memory_bytes["total"] > gpu.memory_bytes:
            notes.append(f"{arm.name} does not fit: {_gib(arm.memory_bytes['total'])} of {_gib(gpu.memory_bytes)}")
    return notes


def _part(arm: Arm, name: str) -> str:
    us = sum(part.us for part in arm.step.parts if part.name == name)
    return f"{_seconds(us)} {us / arm.step.us:4.0%}" if us else "–"


def _seconds(us: float) -> str:
    return f"{us / 1e6:,.2f} s" if us >= 1e6 else f"{us / 1e3:,.1f} ms"


def _gib(nbytes: int) -> str:
    return f"{nbytes / 2**30:,.1f} GiB"
