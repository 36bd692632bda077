"""From a plan file and the trace it was made for to a simulated layer."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from ..planner.cluster import Cluster
from ..planner.cost import CostModel, DatasheetCost
from ..planner.plan import Plan
from ..planner.workload import workload
from ..traces.errors import InputError
from ..traces.pattern import LayerPattern
from ..traces.store import Trace
from .engine import LayerEvaluation, simulate_layer

UNVALIDATED = "unvalidated: from data sheets, not from measurements on this cluster"


@dataclass(frozen=True, kw_only=True)
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


def simulate_plan(
    plan: Plan,
    pattern: LayerPattern,
    cluster: Cluster,
    *,
    cost: CostModel | None = None,
    seed: int | None = None,
    jitter: float = 0.0,
    timeline: bool = True,
) -> LayerEvaluation:
    """Play forward and backward of one layer under the plan; its timeline says plan, cluster and validity.

    cost: by default the cluster's datasheet. Raises InputError when pattern, plan and cluster do not fit together.
    """
    plan.require(seq_len_tokens=pattern.seq_len_tokens)
    if (pattern.num_heads, pattern.block_size) != (plan.model.heads, plan.block_size):
        raise InputError(
            f"has {pattern.num_heads} heads in blocks of {pattern.block_size}, "
            f"the plan {plan.model.heads} in blocks of {plan.block_size}",
            field="pattern",
        )
    cost = cost or DatasheetCost(gpu=cluster.gpu, head_dim=plan.model.head_dim, block_size=plan.block_size)
    result = simulate_layer(
        plan.schedule("forward"),
        plan.schedule("backward"),
        workload(pattern, plan.make_placement()),
        cluster,
        cost,
        seed=seed,
        jitter=jitter,
        timeline=timeline,
    )
    if result.timeline is None:
        return result
    metadata = {"plan_digest": plan.digest, "cluster": cluster.name, "seed": seed, "jitter": jitter}
    if cluster.origin != "measured":
        metadata["validity"] = UNVALIDATED
    return replace(result, timeline=replace(result.timeline, metadata=metadata))
