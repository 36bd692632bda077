"""The verbs `plan` and `check`. Prints tables for people and, with --json, one document for machines."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from ..traces.dataset.store import Trace
from ..traces.errors import InputError, ScheduleError, unknown_name
from ..traces.files import require_output
from ..traces.progress import shown_progress
from .check.check import CheckReport, check_step
from .check.check import check as prove
from .chosen_cluster import ClusterOption, SetOption, chosen_cluster
from .layouts.registry import layout_names
from .plan import KernelSpec, Plan, load_launches, load_plan
from .schedule.backends import known_backends
from .schedule.schedule import DIRECTIONS, Direction, Schedule
from .search.problem import DEFAULT_MEMORY_FRACTION, PLACEMENTS, SearchSpace
from .search.search import plan_trace
from .search.selection import SIMULATED_RANKS
from .shown import PROVED, show_plan, show_proof
from .spawned import available_cores
from .specs import DType

BACKENDS = known_backends()
EVALUATORS = ("simulator", "recurrence")
LAYERS_HELP = (
    f"Layers to evaluate, as 0,17; default: four, spread. The simulator takes as many of them as {SIMULATED_RANKS} "
    "divided by the cluster's GPUs, at least one."
)


def plan(
    context: typer.Context,
    trace: Annotated[Path, typer.Option(help="Folder of a trace.")],
    cluster: ClusterOption,
    output: Annotated[Path, typer.Option("--output", "-o", help="Where to write the plan.")] = Path("plan.json"),
    dtype: Annotated[
        str, typer.Option(help=f"Of q, k, v: {', '.join(get_args(DType))}.", autocompletion=lambda: get_args(DType))
    ] = "bfloat16",
    backend: Annotated[
        str, typer.Option(help=f"Kernels that will run: {', '.join(BACKENDS)}.", autocompletion=known_backends)
    ] = "fastest",
    launches: Annotated[
        Path | None, typer.Option(help="Launch settings for the kernels: a file of `doctor --kernels --tune`.")
    ] = None,
    memory_limit_bytes: Annotated[
        int | None, typer.Option(help="For one layer's attention on one GPU; overrides the fraction.")
    ] = None,
    memory_fraction: Annotated[
        float, typer.Option(help="The same, as a share of the GPU's memory.")
    ] = DEFAULT_MEMORY_FRACTION,
    steps: Annotated[str | None, typer.Option(help="Training steps to evaluate, as 0,10; default: the last.")] = None,
    layers: Annotated[str | None, typer.Option(help=LAYERS_HELP)] = None,
    evaluator: Annotated[str, typer.Option(help="Has the last word: simulator or recurrence.")] = "simulator",
    layout: Annotated[
        list[str] | None,
        typer.Option(
            help=f"Restrict to it; may be repeated: {', '.join(layout_names())}.", autocompletion=layout_names
        ),
    ] = None,
    placement: Annotated[
        list[str] | None,
        typer.Option(
            help=f"Restrict to it; may be repeated: {', '.join(PLACEMENTS)}.", autocompletion=lambda: PLACEMENTS
        ),
    ] = None,
    narrow_gradients: Annotated[
        bool,
        typer.Option("--narrow-gradients", help="Let dK/dV of others travel rounded to 16 bits: half the bytes."),
    ] = False,
    no_pulls: Annotated[
        bool,
        typer.Option("--no-pulls", help="Send, even where the cluster's GPUs could read each other's memory."),
    ] = False,
    settings: SetOption = None,
    pattern: Annotated[str, typer.Option(help="trace: replay its patterns; choose: choose anew as it did.")] = "trace",
    processes: Annotated[
        int | None,
        typer.Option(min=1, max=2, help="2: score both directions at once, on many ranks. Default: as cores allow."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Recorded in the plan's provenance.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Find the best placement and layout for a trace and a cluster, and write the plan."""
    for field, value, known in (
        ("--dtype", dtype, get_args(DType)),
        ("--backend", backend, BACKENDS),
        ("--evaluator", evaluator, EVALUATORS),
    ):
        if value not in known:
            raise unknown_name(value, known, field=field)
    require_output(output, kind="plan", key="placement")
    space = SearchSpace(
        layouts=tuple(layout or ()),
        placements=tuple(placement or ()),
        narrow_gradients=narrow_gradients,
        pulls=not no_pulls,
        memory_limit_bytes=memory_limit_bytes,
        memory_fraction=memory_fraction,
        steps=_numbers("--steps", steps),
        layers=_numbers("--layers", layers),
        pattern=pattern,
        dtype=dtype,  # pyright: ignore[reportArgumentType]  # checked above
        kernels=KernelSpec.model_validate(
            {"backend": backend, "tuned": None if launches is None else load_launches(launches)}
        ),
    )
    with shown_progress() as report:
        made = plan_trace(
            Trace.open(trace),
            chosen_cluster(cluster, settings),
            space,
            evaluator=context.obj["evaluator"] if evaluator == "simulator" else None,
            provenance={"command": shlex.join(["sparsering", *sys.argv[1:]]), "seed": seed},
            progress=report,
            processes=min(2, processes or available_cores()),
        )
    made.save(output)
    if as_json:
        typer.echo(json.dumps({"plan": str(output), **_summary(made), "predictions": made.predictions}))
    else:
        show_plan(made, output)


def check(
    plan: Annotated[Path, typer.Argument(help="A plan file.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Prove that a plan computes everything once, in time, within its buffers, and cannot deadlock."""
    made = load_plan(plan)
    reports = {}
    with shown_progress() as report:
        for number, direction in enumerate(DIRECTIONS):
            with _named(plan, direction):
                reports[direction] = prove(made.schedule(direction), inactive=made.active_pairs().left_out())
            report("proving", number + 1, len(DIRECTIONS))
    with _named(plan):
        check_step(made.schedule("forward"), made.schedule("backward"))
    if as_json:
        figures = {direction: _figures(made.schedule(direction), one) for direction, one in reports.items()}
        typer.echo(json.dumps({"plan": str(plan), **_summary(made), "proved": list(PROVED), "figures": figures}))
    else:
        show_proof(made, reports)


@contextmanager
def _named(path: Path, direction: Direction | None = None) -> Iterator[None]:
    """Let what refuses a plan name its file, and broken rules the direction."""
    try:
        yield
    except ScheduleError as error:
        raise InputError(str(error), source=path, field=direction) from error
    except InputError as error:
        raise InputError(str(error), source=path) from error


def _numbers(field: str, text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise InputError(f"{text!r} is not a list of whole numbers such as 0,10", field=field) from error


def _summary(made: Plan) -> dict[str, Any]:
    """Return what identifies a plan and what it does, in a few JSON values."""
    return {
        "digest": made.digest,
        "world_size": made.world_size,
        "seq_len_tokens": made.seq_len_tokens,
        "placement": made.placement.model_dump(include={"name", "granularity_tokens"}),
        "forward": made.forward.model_dump(include={"layout", "parameters"}),
        "backward": made.backward.model_dump(include={"layout", "parameters"}),
        "backend": made.kernels.backend,
        "shard_pairs": {"computed": int(made.active_pairs().matrix.sum()), "all": made.world_size**2},
    }


def _figures(schedule: Schedule, report: CheckReport) -> dict[str, Any]:
    sent_bytes = {name: max(values) for name, values in report.sent_bytes.items()}
    stated = {"schedule_sha256": schedule.sha256(), "buffer_bytes": schedule.buffer_bytes}
    return stated | asdict(report) | {"sent_bytes": sent_bytes}
