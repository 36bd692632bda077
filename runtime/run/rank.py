"""What one process of the verb `run` does: a rank of the plan; rank 0 reports."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import torch
import typer

from ...planner.plan import Plan
from ...traces.errors import InputError, unknown_name
from ...traces.output import Table, offer_report, say, show
from ...traces.pattern import LayerPattern
from ...traces.progress import no_progress, shown_progress
from ..attention.here import require_backend_here
from ..comm.mesh import Mesh, leave, naming_lost_ranks
from .execute import RunOptions, RunResult, execute


def run_rank(
    mesh: Mesh, plan: Plan, pattern: LayerPattern | None, options: RunOptions, report: Callable[[RunResult], None]
) -> bool:
    """Execute the plan as one rank; rank 0 reports. Return, on all ranks, whether all verdicts are good."""
    try:
        with naming_lost_ranks(mesh):
            with shown_progress() as progress:
                result = execute(plan, mesh, pattern, options, no_progress if mesh.rank else progress)
            if result is not None:
                report(result)
            return mesh.broadcast("verified", result is None or all(v.ok for v in result.verdicts))
    finally:
        leave()


def require_devices(plan: Plan, *, device: str | None) -> None:
    """Refuse once what every rank that is started on this host would refuse: InputError names the device."""
    if device not in (None, "cpu", "cuda"):
        raise unknown_name(device, ("cpu", "cuda"), field="device")
    ranks, gpus = plan.world_size, torch.cuda.device_count()
    if device == "cuda" and gpus < ranks:
        raise InputError(f"the plan is for {ranks} ranks, this host has {gpus} GPUs", field="device")


def require_kernels(plan: Plan, source: Path, *, device: str | None) -> None:
    """Refuse a plan whose kernels do not run on the device: InputError names the plan's file, `source`."""
    used = device or ("cuda" if torch.cuda.is_available() else "cpu")
    require_backend_here(plan.kernels.backend, device=used, source=source)


def crowded(ranks: int, *, device: str | None) -> str | None:
    """Return a warning where more ranks than processor cores are to run on the CPU: right, but slow."""
    cores = len(os.sched_getaffinity(0))
    if ranks <= cores or device == "cuda" or (device is None and torch.cuda.is_available()):
        return None
    return f"{ranks} ranks on {cores} processor core{'s' if cores > 1 else ''}: right, but slow"


def report(plan: Plan, result: RunResult, output: Path | None, as_json: bool) -> None:
    """Write the timeline where it was asked for, and print the figures."""
    if output is not None:
        result.timeline.save(output)
    summary = result.summary()
    if as_json:
        typer.echo(json.dumps(summary | {"plan_digest": plan.digest}))
        return
    say(_answer(plan, result), answer=True)
    say(f"plan {plan.digest[:12]}: {plan.placement.name} placement, forward {plan.forward.value}, backward "
        f"{plan.backward.value}")  # fmt: skip
    if summary["peak_bytes"]:
        say(f"memory: {summary['peak_bytes'] / 1e6:,.1f} MB on the fullest GPU")
    if result.verdicts:
        show(_verification(result))
    if output is not None:
        say(f"timeline: {output} (open it in https://ui.perfetto.dev)")
        offer_report(output)


def _answer(plan: Plan, result: RunResult) -> str:
    """Return one line: what a layer took, how far repeats differ, what was predicted, and whether results are right."""
    times_us, middle_us = result.step_times_us, result.summary()["step_time_us"]
    where = result.timeline.metadata.get("device", "cpu")
    told = f"One layer, forward and backward, took {_ms(middle_us)} on {plan.world_size} ranks ({where})"
    told += f", the median of {len(times_us)} repeats from {_ms(min(times_us))} to {_ms(max(times_us))}."
    predicted_us = plan.predictions.get("step_time_us")
    if isinstance(predicted_us, int | float):
        told += f" Predicted for {plan.provenance.get('cluster', 'a cluster')}: {_ms(predicted_us)}."
    if not result.verdicts:
        return f"{told} Results were not checked (--verify does)."
    right = all(verdict.ok for verdict in result.verdicts)
    return f"{told} {'Verified' if right else 'WRONG'} against a float64 reference on every rank."


def _verification(result: RunResult) -> Table:
    """Return a row for each result: its largest error, relative to what is allowed, over all ranks."""
    rows = []
    for name in dict.fromkeys(verdict.name for verdict in result.verdicts):
        worst = max((v for v in result.verdicts if v.name == name), key=lambda v: v.error / max(v.tolerance, 1e-300))
        rows.append((name, f"{worst.error:.2e}", f"{worst.tolerance:.2e}", "ok" if worst.ok else "FAILED"))
    return Table(columns=("", "largest error", "allowed", "verdict"), rows=rows, text=("verdict",))


def _ms(us: float) -> str:
    return f"{us / 1e3:,.3f} ms"
