"""Attention's share of a step: some recorded layers simulated under the run's plan, or dense attention in a ring."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ....planner.cost.cluster import Cluster
from ....planner.cost.kernels import datasheet_cost
from ....planner.cost.model import CostModel
from ....planner.plan import Plan
from ....planner.search.sampling import model_of
from ....traces.dataset.store import Trace
from ....traces.errors import InputError
from ....traces.pattern import LayerPattern, dense
from ....traces.progress import Progress, no_progress


class SimulatedLayer(Protocol):
    """What the simulator says of one layer."""

    @property
    def forward(self) -> Any:
        """Forward: `makespan_us`."""
        ...

    @property
    def backward_alone_us(self) -> float:
        """Backward, host and device beginning together."""
        ...


SimulatePlan = Callable[..., SimulatedLayer]  # (plan, pattern, cluster, layer=, cost=, timeline=)


@dataclass(frozen=True, kw_only=True)
class LayerTimes:
    """Mean times of a layer, in microseconds. layers: those that were simulated; spread: (max - min) / mean of them."""

    forward_us: float
    backward_us: float
    layers: tuple[int, ...]
    spread: float


def sparse_layer(
    plan: Plan, trace: Trace, cluster: Cluster, simulate: SimulatePlan, *, most_layers: int,
    progress: Progress = no_progress,
) -> LayerTimes:  # fmt: skip
    """Return the mean layer of a trace's last training step under a plan: of evenly spaced layers, at most so many."""
    if not trace.steps:
        raise InputError("holds no training step", source=trace.folder)
    recorded = model_of(trace)
    if recorded != plan.model:
        told = recorded.difference(plan.model) or ("model", f"{recorded}", f"{plan.model}")
        raise InputError(f"is of {told[1]}, the run's model has {told[2]}", source=trace.folder, field=told[0])
    patterns = {
        layer: trace.layer_pattern(trace.steps[-1], layer) for layer in evenly_spaced(trace.layers, most_layers)
    }
    try:
        return layer_times(plan, patterns, cluster, simulate, progress=progress)
    except InputError as error:
        raise type(error)(str(error), source=trace.folder) from error


def layer_times(
    plan: Plan, patterns: Mapping[int, LayerPattern], cluster: Cluster, simulate: SimulatePlan, *,
    progress: Progress = no_progress,
) -> LayerTimes:  # fmt: skip
    """Return the mean layer under a plan. patterns: by layer."""
    found = []
    for done, (layer, pattern) in enumerate(patterns.items()):
        progress("layers simulated", done, len(patterns))
        found.append(_times(simulate(plan, pattern, cluster, layer=layer, timeline=False)))
    return _mean(found, list(patterns))


def dense_layer(plan: Plan, cluster: Cluster, simulate: SimulatePlan) -> LayerTimes:
    """Return a layer of dense causal attention under a plan, at the rates that the cluster says of dense kernels."""
    pattern: LayerPattern = dense(
        seq_len_tokens=plan.seq_len_tokens, block_size=plan.block_size, heads=plan.model.heads
    )
    cost = dense_cost(plan, cluster)
    return _mean([_times(simulate(plan, pattern, cluster, cost=cost, timeline=False))], [0])


def dense_cost(plan: Plan, cluster: Cluster) -> CostModel:
    """Return the costs of dense kernels: the GPU's efficiencies for them, where it says any."""
    gpu = cluster.gpu
    rates = {
        "block_forward_efficiency": gpu.dense_forward_efficiency or gpu.block_forward_efficiency,
        "block_backward_efficiency": gpu.dense_backward_efficiency or gpu.block_backward_efficiency,
        "backends": {},
    }
    return datasheet_cost(gpu.model_copy(update=rates), plan.model, block_size=plan.block_size, dtype=plan.dtype)


def evenly_spaced(layers: Sequence[int], most: int) -> list[int]:
    """Return at most so many of the layers, the middles of equal stretches."""
    count = min(most, len(layers))
    return [layers[(2 * number + 1) * len(layers) // (2 * count)] for number in range(count)]


def _times(layer: SimulatedLayer) -> tuple[float, float]:
    return layer.forward.makespan_us, layer.backward_alone_us


def _mean(times: Sequence[tuple[float, float]], layers: Sequence[int]) -> LayerTimes:
    sums = [forward + backward for forward, backward in times]
    mean = statistics.fmean(sums)
    return LayerTimes(
        forward_us=statistics.fmean(forward for forward, _ in times),
        backward_us=statistics.fmean(backward for _, backward in times),
        layers=tuple(layers),
        spread=(max(sums) - min(sums)) / mean if mean else 0.0,
    )
