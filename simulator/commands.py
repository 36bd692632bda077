"""The verbs `simulate` and `compare`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..planner.chosen_cluster import chosen_cluster
from ..planner.cost.cluster import preset_names
from ..planner.plan import load_plan
from ..planner.replay import find_trace, recorded_layer
from ..traces.errors import InputError
from ..traces.timeline import Timeline
from .engine import Jitter
from .metrics import DirectionMetrics, timeline_metrics
from .simulate_plan import UNVALIDATED, simulate_plan

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]


def simulate(
    plan: Annotated[Path, typer.Argument(help="A plan file.")],
    cluster: Annotated[str, typer.Option(help=f"YAML file or preset: {', '.join(preset_names())}.")],
    trace: Annotated[
        Path | None, typer.Option(help="The plan's trace; default: the folder of its name beside it.")
    ] = None,
    training_step: Annotated[int | None, typer.Option("--step", help="Training step; default: the last.")] = None,
    layer: Annotated[int | None, typer.Option(help="Layer; default: the middle one of those recorded.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the timeline here (.json.gz).")] = None,
    seed: Annotated[int, typer.Option(help="Of the jitter.")] = 0,
    jitter: Annotated[float, typer.Option(help="Noise on compute: standard deviation of its logarithm.")] = 0.0,
    as_json: AsJson = False,
) -> None:
    """Play a plan in simulated time: forward and backward of one recorded layer; write its timeline."""
    if output is not None:
        Timeline.require_writable(output)
    made = load_plan(plan)
    where = chosen_cluster(cluster)
    recorded = recorded_layer(find_trace(made, plan, trace), training_step, layer)
    with Console(stderr=True).status("simulating"):
        noise = Jitter(sigma=jitter, seed=seed)
        result = simulate_plan(made, recorded.pattern, where, layer=recorded.layer, jitter=noise)
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
        _show_simulation(facts, metrics)


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
    names = [f"{path.name} ({timelines[path].source})" for path in (first, second)]
    for direction in dict.fromkeys([*sides[0], *sides[1]]):
        _show_comparison(direction, names, [side.get(direction) for side in sides])


def _show_simulation(facts: dict[str, Any], metrics: list[DirectionMetrics]) -> None:
    console = Console()
    table = _table(
        ("", "makespan", "compute mean", "exposed mean", "worker imbalance", "step imbalance"),
        title=escape(f"layer {facts['layer']} of training step {facts['training_step']} on {facts['cluster']}"),
    )
    for one in metrics:
        exposed = f"{_time(one.exposed_mean_us)} ({one.exposed_mean_us / one.makespan_us:.0%})"
        times = _time(one.makespan_us), _time(one.compute_mean_us), exposed
        table.add_row(one.direction, *times, f"{one.worker_imbalance:.3f}", f"{one.step_imbalance:.3f}")
    console.print(table)
    console.print(
        f"step time {_time(facts['step_time_us'])}, buffers {facts['peak_buffer_bytes'] / 2**20:.1f} MiB a rank"
    )
    gpus = facts["gpus"]
    if gpus["used"] < gpus["of"]:
        console.print(f"{gpus['used']} of the cluster's {gpus['of']} GPUs are used: the plan has no more ranks")
    console.print(f"[dim]{escape(facts['validity'])}[/dim]")
    if facts["timeline"]:
        console.print(f"timeline: {escape(facts['timeline'])} (open it in https://ui.perfetto.dev)")


def _show_comparison(direction: str, names: list[str], sides: list[DirectionMetrics | None]) -> None:
    """Print two tables of a direction: its phases, and its figures with their ratio. sides: A's and B's metrics."""
    console = Console()
    table = Table(title=escape(f"{direction}: A is {names[0]}, B is {names[1]}"))
    for name in ("phase", "compute A", "B", "compute max A", "B", "exposed A", "B", "transfer A", "B"):
        table.add_column(name, justify="right")
    phases = [{one.phase: one for one in side.phases} if side else {} for side in sides]
    for phase in sorted({*phases[0], *phases[1]}):
        fields = product(("compute_mean_us", "compute_max_us", "exposed_mean_us", "transfer_us"), phases)
        shown = [_time(getattr(side[phase], name)) if phase in side else "–" for name, side in fields]
        table.add_row(str(phase), *shown)
    console.print(table)
    table = _table(("", "A", "B", "B / A"))
    for name in ("makespan_us", "compute_mean_us", "exposed_mean_us", "tail_mean_us", "worker_imbalance",
                 "step_imbalance"):  # fmt: skip
        show = _time if name.endswith("_us") else "{:.3f}".format
        values = [None if side is None else getattr(side, name) for side in sides]
        ratio = f"{values[1] / values[0]:.3f}" if values[0] and values[1] is not None else "–"
        shown = ["–" if value is None else show(value) for value in values]
        table.add_row(name.removesuffix("_us").replace("_", " "), *shown, ratio)
    console.print(table)


def _table(columns: Sequence[str], **settings: Any) -> Table:
    """Return a table whose columns are figures, but for the first, which has no name."""
    table = Table(**settings)
    for name in columns:
        table.add_column(name, justify="right" if name else "left")
    return table


def _time(us: float) -> str:
    return f"{us / 1000:.3f} ms" if us < 1e6 else f"{us / 1e6:.3f} s"
