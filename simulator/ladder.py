"""MTraining's ladder in simulated time: what each of its ideas gains for Qwen2.5-3B at 512K tokens on 32 A100s.

MTraining (arXiv 2510.18830) trains with attention that is 95 % sparse and reports up to six times the throughput of
dense attention. The rungs: dense zigzag ring, sparse zigzag ring, sparse striped ring, sparse striped hierarchical
ring. Nothing here is fitted to those speed-ups; `ASSUMPTIONS` says where every number comes from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from ..planner.cost.cluster import Cluster, Link, load_cluster
from ..planner.cost.evaluation import Evaluation
from ..planner.cost.kernels import DatasheetCost
from ..planner.layouts.registry import build
from ..planner.schedule.schedule import DIRECTIONS, Direction, Schedule
from ..planner.schedule.workload import Workload
from .engine import simulate
from .ladder_work import Setting, shape_of, workloads

CLUSTER = "a100-hdr-4x8"
KERNELS = "mtraining"  # no backend of ours: every step of a ring is one launch, in backward too
PUBLISHED_INTRA_STEP_US = 130.0
PUBLISHED_INTER_STEP_US = 980.0

ASSUMPTIONS = (
    "Model: Qwen2.5-3B, 36 layers, 16 query and 2 KV heads of 128, hidden 2,048, MLP 11,008, vocabulary 151,936; one"
    " sequence of 524,288 tokens over 32 GPUs, bf16, dK/dV in float32 on their way home.",
    "Dense kernels: 70 % (forward) and 60 % (backward) of an A100's peak. FlashAttention-2 reports up to 73 % and 63 %"
    " (arXiv 2307.08691).",
    "Sparse kernels, forward: the efficiency at which a step of the hierarchical ring computes for the 0.51 ms that"
    " MTraining publishes for it (mean over ranks and steps). Backward: that times 180.2 / 382.1, the ratio of"
    " MTraining's Triton kernels measured on one H200 at 6.3 % density (no such figure is published for an A100).",
    "Pattern: seeded synthetic vertical-slash heads, 5 % of the causal 64 x 64 blocks and 1,024 columns a head, the"
    " same for all layers; MTraining fixes 95 % sparsity. Three tenths of the blocks lie beside the diagonal; the other"
    " slashes are spread over all distances, each head's its own, or lie in 8 bands that all heads share. Spread"
    " slashes are kind to a zigzag, bands are not; where real ones lie, a captured trace will say. Eight is arbitrary:"
    " bands were added because with them a zigzag's step imbalance is above 2.4, as published.",
    "Decoder layers are recomputed in backward (MTraining's train.py: `recompute_modules`), so attention runs forward"
    " twice, and so does the rest (8 FLOPs per weight and token). The rest runs at 50 % of peak.",
    "Choosing the sparse index: 1.13 ms, and 2.08 ms on the CPU, per forward of a layer, as published.",
    "Not modelled: optimizer, gradient reduction, merging partial outputs, adding landed gradients, the data loader.",
)


@dataclass(frozen=True, kw_only=True)
class Rung:
    """One step of the ladder. published: training speed-up over dense, or None where none is."""

    name: str
    placement: str
    layout: str
    sparse: bool = True
    published: float | None = None


RUNGS = (
    Rung(name="dense, zigzag ring", placement="zigzag", layout="ring", sparse=False, published=1.0),
    Rung(name="sparse, zigzag ring", placement="zigzag", layout="ring", published=2.9),
    Rung(name="sparse, striped ring", placement="striped", layout="ring", published=4.6),
    Rung(name="sparse, striped hierarchical ring", placement="striped", layout="hierarchical", published=6.0),
    Rung(name="sparse, zigzag hierarchical ring", placement="zigzag", layout="hierarchical"),
)
CALIBRATION_RUNG = RUNGS[3]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One rung in simulated time: forward and backward of a layer's attention, and the training step they make."""

    rung: Rung
    forward: Evaluation
    backward: Evaluation
    choosing_us: float
    attention_us: float
    other_us: float

    @property
    def step_us(self) -> float:
        """One training step of one sequence."""
        return self.attention_us + self.other_us

    @property
    def exposed(self) -> float:
        """Share of attention in which the mean rank waits."""
        waiting = self.forward.exposed_us.mean() + self.backward.exposed_us.mean()
        return float(waiting / (self.forward.makespan_us + self.backward.makespan_us))


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One way to fill what the paper leaves open."""

    title: str
    cluster: Cluster
    setting: Setting = field(default_factory=Setting)


@dataclass(frozen=True, kw_only=True)
class Ladder:
    """All rungs of one variant, with the efficiencies that were used."""

    variant: Variant
    sparse_forward_efficiency: float
    sparse_backward_efficiency: float
    outcomes: tuple[Outcome, ...]

    def speed_up(self, outcome: Outcome) -> float:
        """Throughput over that of the dense rung."""
        return self.outcomes[0].step_us / outcome.step_us


def climb(variants: Sequence[Variant]) -> list[Ladder]:
    """Simulate all rungs of each variant."""
    placements = {sparse: [rung.placement for rung in RUNGS if rung.sparse == sparse] for sparse in (False, True)}
    counted: dict[tuple[Setting, int], dict[tuple[str, bool], Workload]] = {}
    ladders = []
    for variant in variants:
        # the work does not depend on how fast kernels are: variants that differ in that alone share it
        key = (replace(variant.setting, backward_to_forward=1.0), variant.cluster.world_size)
        if key not in counted:
            counted[key] = workloads(variant.setting, placements, variant.cluster.world_size)
        ladders.append(_ladder(variant, counted[key]))
    return ladders


def default_variants() -> list[Variant]:
    """Return two patterns on two kinds of links, and one with a faster backward."""
    data_sheet = load_cluster(CLUSTER)
    setting = Setting()
    banded = replace(setting, slashes="banded")
    published = published_links(data_sheet, shape_of(setting, data_sheet.world_size).kv_bytes)
    quick = replace(banded, backward_to_forward=1.0)
    return [
        Variant(title="spread slashes, links from data sheets", cluster=data_sheet, setting=setting),
        Variant(title="banded slashes, links from data sheets", cluster=data_sheet, setting=banded),
        Variant(title="spread slashes, links as slow as published", cluster=published, setting=setting),
        Variant(title="banded slashes, links as slow as published", cluster=published, setting=banded),
        Variant(title="the same, backward kernels as efficient as forward", cluster=published, setting=quick),
    ]


def published_links(cluster: Cluster, kv_bytes: int) -> Cluster:
    """Return the cluster with links on which a K/V shard takes the 0.13 (NVLink) and 0.98 ms (InfiniBand) published."""
    assert cluster.inter_node is not None

    def slowed(link: Link, step_us: float) -> Link:
        return link.model_copy(update={"bandwidth_bytes_per_us": kv_bytes / (step_us - link.latency_us)})

    intra = slowed(cluster.intra_node, PUBLISHED_INTRA_STEP_US)
    inter = slowed(cluster.inter_node, PUBLISHED_INTER_STEP_US)
    return cluster.model_copy(update={"intra_node": intra, "inter_node": inter})


def _ladder(variant: Variant, counted: dict[tuple[str, bool], Workload]) -> Ladder:
    forward = _sparse_forward_efficiency(variant, counted["striped", True])
    backward = forward * variant.setting.backward_to_forward
    return Ladder(
        variant=variant,
        sparse_forward_efficiency=forward,
        sparse_backward_efficiency=backward,
        outcomes=tuple(
            _outcome(rung, variant, counted[rung.placement, rung.sparse], forward, backward) for rung in RUNGS
        ),
    )


def _outcome(
    rung: Rung, variant: Variant, work: Workload, forward_efficiency: float, backward_efficiency: float
) -> Outcome:
    setting, cluster = variant.setting, variant.cluster
    cost = _cost(variant, rung, forward_efficiency, backward_efficiency)
    forward, backward = (simulate(_build(rung, variant, one), work, cluster, cost) for one in DIRECTIONS)
    choosing_us = setting.choosing_us if rung.sparse else 0.0
    passes = 2 if setting.recomputed else 1
    layer_us = passes * (forward.makespan_us + choosing_us) + backward.makespan_us
    return Outcome(
        rung=rung,
        forward=forward,
        backward=backward,
        choosing_us=choosing_us,
        attention_us=setting.model.layers * layer_us,
        other_us=_other_us(setting, cluster),
    )


def _cost(variant: Variant, rung: Rung, forward_efficiency: float, backward_efficiency: float) -> DatasheetCost:
    """Return the cost of a rung's kernels: those of dense attention, or sparse ones of the given efficiencies.

    Accumulators are not modelled: partial outputs are merged outside of these kernels.
    """
    setting = variant.setting
    if not rung.sparse:
        forward_efficiency, backward_efficiency = setting.dense_forward_efficiency, setting.dense_backward_efficiency
    gpu = variant.cluster.gpu.model_copy(
        update={
            "block_forward_efficiency": forward_efficiency,
            "block_backward_efficiency": backward_efficiency,
            "memory_bandwidth_bytes_per_us": None,
        }
    )
    block_size = setting.sparse_block if rung.sparse else setting.dense_block
    return DatasheetCost(
        gpu=gpu, head_dim=setting.model.head_dim, block_size=block_size, backend=KERNELS, one_pass_backward=True
    )


def _sparse_forward_efficiency(variant: Variant, work: Workload) -> float:
    """Return the efficiency at which the mean step of the striped hierarchical ring computes for the published time.

    A task takes overhead + (its time at full efficiency) / efficiency, so one evaluation at 1.0 settles it.
    """
    gpu = variant.cluster.gpu
    silent = gpu.model_copy(update={"communication_slowdown": 0.0, "pull_slowdown": None})
    quiet = variant.cluster.model_copy(update={"gpu": silent})
    schedule = _build(CALIBRATION_RUNG, variant, "forward")
    ideal_us = simulate(schedule, work, quiet, _cost(variant, CALIBRATION_RUNG, 1.0, 1.0)).phase_us
    tasks = np.count_nonzero(ideal_us)
    working_us = variant.setting.published_step_us * ideal_us.size - tasks * gpu.launch_overhead_us
    return float((ideal_us.sum() - tasks * gpu.launch_overhead_us) / working_us)


def _build(rung: Rung, variant: Variant, direction: Direction) -> Schedule:
    cluster = variant.cluster
    parameters = {"inner_size": cluster.gpus_per_node} if rung.layout == "hierarchical" else {}
    shape = shape_of(variant.setting, cluster.world_size)
    return build(rung.layout, parameters, shape=shape, direction=direction)


def _other_us(setting: Setting, cluster: Cluster) -> float:
    """Return the time of everything but attention: two FLOPs per weight and token forward, four backward."""
    passes = 8 if setting.recomputed else 6
    flops = setting.seq_len_tokens * (passes * setting.model.layer_parameters + 6 * setting.model.head_parameters)
    return flops / (cluster.world_size * cluster.gpu.peak_flops_per_us * setting.matmul_efficiency)
