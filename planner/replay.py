"""From a plan file to the recorded patterns it was made for: what `simulate` and `run` replay."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..traces.dataset.store import Trace
from ..traces.errors import InputError
from ..traces.pattern import LayerPattern
from .plan import Plan


@dataclass(frozen=True, kw_only=True, eq=False)
class Recorded:
    """One recorded layer of a trace."""

    training_step: int
    layer: int
    pattern: LayerPattern


def find_trace(plan: Plan, plan_path: Path, given: Path | None) -> Trace:
    """Open the trace given, or the one of the plan's name beside the plan; InputError when it is not the plan's."""
    name = plan.provenance.get("trace")
    folder = given or plan_path.parent / str(name or "trace")
    if given is None and not folder.is_dir():
        raise InputError(f"holds no patterns and {folder} is no folder; name the trace with --trace", source=plan_path)
    trace = Trace.open(folder)
    planned = plan.pattern.trace_sha256
    if planned is not None and trace.digest() != planned:
        raise InputError(f"is {planned}, the trace {folder} has {trace.digest()}", source=plan_path, field="trace")
    return trace


def recorded_layer(trace: Trace, training_step: int | None, layer: int | None) -> Recorded:
    """Read one layer; by default of the last training step, the middle one of those recorded."""
    if not trace.steps:
        raise InputError("holds no training step", source=trace.folder)
    step = trace.steps[-1] if training_step is None else training_step
    if step not in trace.steps:
        raise InputError(f"{step} was not recorded", source=trace.folder, field="training_step")
    chosen = trace.layers[len(trace.layers) // 2] if layer is None else layer
    return Recorded(training_step=step, layer=chosen, pattern=trace.layer_pattern(step, chosen))
