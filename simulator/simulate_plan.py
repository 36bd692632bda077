"""From a plan file and the trace it was made for to a simulated layer."""

from __future__ import annotations

from dataclasses import replace

from ..planner.cost.cluster import Cluster
from ..planner.cost.measured import plan_cost
from ..planner.cost.model import CostModel
from ..planner.plan import Plan
from ..planner.schedule.workload import workload
from ..traces.errors import InputError
from ..traces.pattern import LayerPattern
from ..traces.progress import Progress, no_progress
from .engine import STEADY, Jitter, LayerEvaluation, simulate_layer

UNVALIDATED = "unvalidated: from data sheets, not from measurements on this cluster"


def simulate_plan(
    plan: Plan,
    pattern: LayerPattern,
    cluster: Cluster,
    *,
    layer: int = 0,
    cost: CostModel | None = None,
    jitter: Jitter = STEADY,
    timeline: bool = True,
    progress: Progress = no_progress,
) -> LayerEvaluation:
    """Play forward and backward of one layer under the plan; its timeline says plan, cluster and validity.

    layer: whose pattern it is. cost: by default the cluster's datasheet.
    Raises InputError when pattern, plan and cluster do not fit together.
    """
    plan.require(seq_len_tokens=pattern.seq_len_tokens)
    if (pattern.num_heads, pattern.block_size) != (plan.model.heads, plan.block_size):
        raise InputError(
            f"has {pattern.num_heads} heads in blocks of {pattern.block_size}, "
            f"the plan {plan.model.heads} in blocks of {plan.block_size}",
            field="pattern",
        )
    plan.require_covered(pattern)
    cost = cost or plan_cost(plan, cluster)
    work, order = workload(pattern, plan.make_placement()), plan.head_order(layer)
    result = simulate_layer(
        (plan.schedule("forward"), plan.schedule("backward")),
        work if order is None else work.with_heads(order),
        cluster,
        cost,
        jitter=jitter,
        timeline=timeline,
        progress=progress,
    )
    if result.timeline is None:
        return result
    metadata = {"plan_digest": plan.digest, "cluster": cluster.name, "seed": jitter.seed, "jitter": jitter.sigma}
    if cluster.origin != "measured":
        metadata["validity"] = UNVALIDATED
    return replace(result, timeline=replace(result.timeline, metadata=metadata))
