"""What benchmarks/ring.py measures: masks of several families, and plans for them, made by hand or by the planner."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from ...kernels.mask import AttentionMask
from ...planner.cost.cluster import Cluster, Nics, load_cluster
from ...planner.cost.measured import cluster_cost
from ...planner.cost.memory import layer_memory
from ...planner.cost.recurrence import CompiledRecurrence
from ...planner.layouts.layout import Layout
from ...planner.layouts.registry import parse_layout
from ...planner.plan import AttentionSpec, KernelSpec, ModelShape, PatternSpec, Plan, make_plan
from ...planner.replay import Recorded
from ...planner.schedule.pairs import active_blocks, pattern_pairs
from ...planner.schedule.placement import REGULAR_PLACEMENTS, Placement, balanced
from ...planner.schedule.schedule import DIRECTIONS
from ...planner.schedule.workload import unit_load
from ...planner.search.problem import Problem, SearchSpace, TraceSummary
from ...planner.search.scores import ScoreBoard
from ...planner.search.selection import select
from ...planner.specs import DType
from ...runtime.pattern.recorded import pattern_of
from ...simulator.engine import simulate
from ...simulator.simulate_plan import simulate_plan
from ...traces.pattern import LayerPattern, lists_blocks
from .masks import MASKS

MODEL = ModelShape(layers=1, heads=16, kv_heads=2, head_dim=128)
BLOCK = 128
MEMORY_SHARE = 0.5
# 64 MB per GPU took 45 ms from four GPUs to four over one host's sockets.
SOCKETS = Nics(name="sockets", bandwidth_bytes_per_us=5700.0, latency_us=50.0, nics_per_node=1)
PLACEMENTS = (*sorted(REGULAR_PLACEMENTS), "balanced", "planned")


@dataclass(frozen=True, kw_only=True, eq=False)
class Work:
    """One mask to measure. columns: per head, which only slash masks have."""

    family: str
    columns: int
    mask: AttentionMask

    @cached_property
    def pattern(self) -> LayerPattern:
        """The mask's patterns on the host."""
        return pattern_of(self.mask)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One configuration. layout: name:parameter=value,…; forward/backward may differ. "planned" takes the planner's."""

    placement: str
    granularity_blocks: int
    backend: str
    layout: str


def make_work(family: str, *, seq_len: int, density: float, columns: int, seed: int, heads: int = MODEL.heads) -> Work:
    """Draw a mask of one family, on the CPU; only slash masks have columns."""
    extra = (columns,) if family == "slash" else ()
    mask = MASKS[family](seq_len, density, *extra, heads=heads, block=BLOCK, seed=seed)
    return Work(family=family, columns=mask.column_capacity, mask=mask)


def make_case_plan(
    case: Case, work: Work, *, cluster: Cluster, leave_out: bool = True, model: ModelShape = MODEL,
    dtype: DType = "bfloat16", narrow_gradients: bool = False,
) -> Plan:  # fmt: skip
    """Return the plan of a case for all GPUs of the cluster; "planned" is the planner's pick, layouts and all.

    leave_out: without the pairs of shards that the mask does not need. narrow_gradients: the planner may round them.
    """
    attention = AttentionSpec(
        model=model, seq_len_tokens=work.mask.seq_len_tokens, block_size=work.mask.block_size, dtype=dtype,
        columns_capacity=work.mask.column_capacity,
    )  # fmt: skip
    kernels = KernelSpec.model_validate({"backend": case.backend})
    if case.placement == "planned":
        space = SearchSpace(
            narrow_gradients=narrow_gradients, memory_fraction=MEMORY_SHARE, dtype=attention.dtype, kernels=kernels
        )
        placement, forward, backward = _picked(work, attention, cluster, space)
    else:
        placement = _placement(case, work.pattern, cluster.world_size)
        text, _, other = case.layout.partition("/")
        forward, backward = parse_layout(text), parse_layout(other or text)
    return make_plan(
        attention=attention,
        placement=placement,
        forward=forward,
        backward=backward,
        pattern=PatternSpec(source="trace", listed=lists_blocks(work.pattern)),
        kernels=kernels,
        pairs=pattern_pairs(work.pattern, placement) if leave_out else None,
    )


def cluster_of(name: str, *, world_size: int, nodes: int) -> Cluster:
    """Return a preset or file as so many nodes of the ranks there are; without a network by sockets."""
    cluster = load_cluster(name)
    if (cluster.nodes, cluster.world_size) == (nodes, world_size):
        return cluster
    network = cluster.inter_node or SOCKETS if nodes > 1 else cluster.inter_node
    return cluster.model_copy(update={"nodes": nodes, "gpus_per_node": world_size // nodes, "inter_node": network})


def predicted_peak_bytes(plan: Plan) -> int:
    """Return what the plan says that a step of one layer needs on every rank."""
    shape, backend = plan.attention_shape(), plan.kernels.backend
    listed = plan.block_size if plan.pattern.listed else None
    given: dict[str, Any] = {
        "backend": backend, "reordered": plan.head_orders is not None, "listed_block_tokens": listed,
    }  # fmt: skip
    return max(layer_memory(plan.schedule(way), shape, **given).total_bytes for way in DIRECTIONS)


def predicted_times(plan: Plan, work: Work, cluster: Cluster) -> dict[str, Any]:
    """Return what the simulator says of the plan on a cluster: a row's fields."""
    simulated = simulate_plan(plan, work.pattern, cluster, timeline=False)
    return {
        "predicted_for": cluster.name,
        "predicted_forward_ms": simulated.forward.makespan_us / 1e3,
        "predicted_backward_ms": simulated.backward_alone_us / 1e3,
        "predicted_step_ms": simulated.makespan_us / 1e3,
    }


def transports_of(plan: Plan) -> str:
    """Return what moves K/V and their gradients: a row's `transport`."""
    schedules = [plan.schedule(way) for way in DIRECTIONS]
    calls = [call for schedule in schedules for phase in schedule.phases(0) for call in phase.group_calls]
    used = {transfer.transport for call in calls for transfer in call.transfers if transfer.kind != "columns"}
    return "+".join(sorted(used)) or "none"


def name_of(plan: Plan) -> str:
    """Return a plan's placement and layouts in a few words: a row's `layout`."""
    words = [spec.value.text for spec in (plan.forward, plan.backward)]
    left_out = "" if plan.pairs is None else f" -{len(plan.active_pairs().left_out())} pairs"
    placed = f"{plan.placement.name}x{plan.placement.granularity_tokens // plan.block_size}"
    return f"{placed} {'/'.join(dict.fromkeys(words))}{left_out}"


def _placement(case: Case, pattern: LayerPattern, world_size: int) -> Placement:
    sizes: dict[str, int] = {
        "seq_len_tokens": pattern.seq_len_tokens,
        "world_size": world_size,
        "granularity_tokens": case.granularity_blocks * pattern.block_size,
    }
    if case.placement != "balanced":
        return REGULAR_PLACEMENTS[case.placement](**sizes)
    padded = REGULAR_PLACEMENTS["striped"](**sizes).padded_tokens
    load = unit_load([pattern], granularity_tokens=sizes["granularity_tokens"], padded_tokens=padded)
    return balanced(unit_load=load, **sizes)


def _picked(
    work: Work, attention: AttentionSpec, cluster: Cluster, space: SearchSpace
) -> tuple[Placement, Layout, Layout]:
    """Search on the cluster as `sparsering plan` does; return the placement, and the layouts of both directions."""
    pattern, backend = work.pattern, space.kernels.backend
    size = pattern.block_size
    load = unit_load([pattern], granularity_tokens=size, padded_tokens=pattern.num_blocks * size)
    problem = Problem(
        space=space,
        cluster=cluster,
        cost=cluster_cost(cluster, attention.model, block_size=size, backend=backend),
        attention=attention,
        samples=(Recorded(training_step=0, layer=0, pattern=pattern),),
        summary=TraceSummary(
            columns_capacity=attention.columns_capacity,
            block_load=np.asarray(load),
            loaded_layers=1,
            recorded_layers=1,
            active_blocks=active_blocks(pattern),
        ),
    )
    pick = select(problem, quick=CompiledRecurrence(), final=simulate).pick
    placement = ScoreBoard(problem=problem).placement(pick.placement)
    return placement, pick.forward_layout, pick.backward_layout
