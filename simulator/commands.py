"""The verbs `simulate` and `compare`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from ..planner.chosen_cluster import ClusterOption, SetOption, chosen_cluster
from ..planner.plan import load_plan
from ..planner.replay import find_trace, recorded_layer
from ..traces.errors import InputError
from ..traces.progress import shown_progress
from ..traces.timeline import Timeline
from .engine import Jitter
from .metrics import timeline_metrics
from .shown import show_comparison, show_simulation
from .simulate_plan import UNVALIDATED, simulate_plan

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]


def simulate(
    plan: Annotated[Path, typer.Argument(help="A plan file.")],
    cluster: ClusterOption,
    trace: Annotated[
        Path | None, typer.Option(help="The plan's trace; default: the folder of its name beside it.")
    ] = None,
    training_step: Annotated[int | None, typer.Option("--step", help="Training step; default: the last.")] = None,
    layer: Annotated[int | None, typer.Option(help="Layer; default: the middle one of those recorded.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the timeline here (.json.gz).")] = None,
    seed: Annotated[int, typer.Option(help="Of the jitter.")] = 0,
    jitter: Annotated[float, typer.Option(help="Noise on compute: standard deviation of its logarithm.")] = 0.0,
    settings: SetOption = None,
    as_json: AsJson = False,
) -> None:
    """Play a plan in simulated time: forward and backward of one recorded layer; write its timeline."""
    if output is not None:
        Timeline.require_writable(output)
    made = load_plan(plan)
    where = chosen_cluster(cluster, settings)
    recorded = recorded_layer(find_trace(made, plan, trace), training_step, layer)
    noise = Jitter(sigma=jitter, seed=seed)
    with shown_progress() as progress:
        result = simulate_plan(made, recorded.pattern, where, layer=recorded.layer, jitter=noise, progress=progress)
    assert result.timeline is not None
    if output is not None:
        result.timeline.save(output)
    metrics = timeline_metrics(result.timeline)
    facts = {
        "plan": str(plan),
        "plan_digest": made.digest,
        "cluster": where.name,
        "gpus": {"used": made.world_size, "of": where.world_size},
        "validity": "measured cluster" if where.origin == "measured" else UNVALIDATED,
        "training_step": recorded.training_step,
        "layer": recorded.layer,
        "step_time_us": result.makespan_us,
        "peak_buffer_bytes": max(result.forward.peak_buffer_bytes, result.backward.peak_buffer_bytes),
        "timeline": None if output is None else str(output),
    }
    if as_json:
        typer.echo(json.dumps(facts | {"directions": [one.to_json() for one in metrics]}))
    else:
        show_simulation(facts, metrics)


def compare(
    first: Annotated[Path, typer.Argument(metavar="A", help="A timeline file.")],
    second: Annotated[Path, typer.Argument(metavar="B", help="Another one.")],
    as_json: AsJson = False,
) -> None:
    """Set two timelines side by side, phase by phase: simulated or measured, in any combination."""
    timelines = {path: Timeline.load(path) for path in (first, second)}
    sides = []
    for path in (first, second):
        try:
            sides.append({one.direction: one for one in timeline_metrics(timelines[path])})
        except InputError as error:
            raise InputError(str(error), source=path) from error
    if as_json:
        told = [
            {
                "file": str(path),
                "source": timelines[path].source,
                "world_size": timelines[path].world_size,
                "metadata": timelines[path].metadata,
                "directions": [one.to_json() for one in side.values()],
            }
            for path, side in zip((first, second), sides, strict=True)
        ]
        typer.echo(json.dumps({"a": told[0], "b": told[1]}))
        return
    show_comparison([f"{path.name} ({timelines[path].source})" for path in (first, second)], sides)
