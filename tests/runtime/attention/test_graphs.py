"""Layers that are played by recordings: the same bits as kernel by kernel, whatever masks and buffers do meanwhile.

A recording here calls the function again, on the recording's own tensors; test_gpu_graphs.py has CUDA graphs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from graph_jobs import Compared
from rank_pool import RankPool
from ring_cases import PATTERNS, Case, make_case_plan
from sparsering.planner.layouts.gather import Gather
from sparsering.planner.layouts.layout import Layout
from sparsering.planner.layouts.ring import Ring
from sparsering.planner.plan import AttentionSpec, Plan, make_plan
from sparsering.runtime.attention.graphs.graphs import EAGER_CALLS, Graphs, Inputs, Outputs
from sparsering.runtime.attention.graphs.words import GraphsSetting
from sparsering.runtime.pattern.selectors import make_selector, pattern_chosen_by

LAYERS = 2 * EAGER_CALLS + 4  # masks of two kinds take turns


def _plan(pattern: str, layout: Layout, world_size: int = 2) -> Plan:
    case = Case(world_size=world_size, placement="striped", granularity_tokens=64, layout=layout, pattern=pattern)
    return make_case_plan(case)


def _alike(results: list[Compared], *, recorded: int) -> None:
    for rank, result in enumerate(results):
        others = [name for name, same in result.same.items() if not same]
        assert not others, f"rank {rank}: {others} differ"
        assert result.recorded == recorded, f"rank {rank} recorded {result.recorded} times"


@pytest.mark.parametrize(
    ("pattern", "layout"),
    [(pattern, Ring(prefetch=1)) for pattern in ("gqa", "documents", "windows", "empty-rows")]
    + [("documents", Gather(chunks=2, keep_kv=True))],
    ids=str,
)
def test_recorded_layers_give_the_same_bits(
    pattern: str, layout: Layout, rank_pools: Callable[[int], RankPool]
) -> None:
    case = PATTERNS[pattern]
    turned = replace(case.pattern, heads=case.pattern.heads[::-1])
    masks = [case.pattern if layer % 2 else turned for layer in range(LAYERS)]
    plan = _plan(pattern, layout)
    results = rank_pools(2).run("graph_jobs.layers_recorded", plan=plan, patterns=masks, **case.form)
    assert {result.recorded for result in results} <= {2, 4}, "forward and backward, of masks of one or of two kinds"
    _alike(results, recorded=results[0].recorded)


@pytest.mark.parametrize("selector", ["xattention", "block-mass", "moba-block", "vertical-slash", "sink-window"])
def test_recorded_choices_are_the_same(selector: str, rank_pools: Callable[[int], RankPool]) -> None:
    settings = {"xattention": {"stride": 8}, "moba-block": {"chunk_tokens": 64, "top_chunks": 2}}.get(selector, {})
    settings = {"columns": 20, "slashes": 20} if selector == "vertical-slash" else settings
    plan = _plan("gqa", Ring(prefetch=1))
    chosen = pattern_chosen_by(make_selector(selector, settings))
    capacity = {"vertical-slash": 64, "sink-window": 64}.get(selector, 0)
    plan = make_plan(
        attention=AttentionSpec(
            model=plan.model, seq_len_tokens=plan.seq_len_tokens, block_size=plan.block_size, dtype=plan.dtype,
            columns_capacity=capacity,
        ),
        placement=plan.make_placement(), forward=Ring(prefetch=1), pattern=chosen, kernels=plan.kernels,
    )  # fmt: skip
    results = rank_pools(2).run("graph_jobs.layers_recorded", plan=plan, patterns=[None] * LAYERS)
    _alike(results, recorded=3)


def test_a_paused_layer_is_played_kernel_by_kernel_between_others(rank_pools: Callable[[int], RankPool]) -> None:
    masks, plan = [PATTERNS["documents"].pattern] * LAYERS, _plan("documents", Ring(prefetch=1))
    results = rank_pools(2).run("graph_jobs.layers_recorded", plan=plan, patterns=masks, paused_layers=(0, 4))
    _alike(results, recorded=2)


def test_recordings_of_other_memory_are_not_replayed(rank_pools: Callable[[int], RankPool]) -> None:
    masks, plan = [PATTERNS["gqa"].pattern] * (LAYERS + 3), _plan("gqa", Ring(prefetch=1))
    results = rank_pools(2).run("graph_jobs.layers_recorded", plan=plan, patterns=masks, larger_after=4)
    _alike(results, recorded=3)


def test_what_returns_is_the_callers_own_and_inputs_of_one_name_share_a_tensor() -> None:
    seen: list[Inputs] = []

    class Twice:
        def __init__(self, compute: Callable[[Inputs], Outputs], inputs: Inputs) -> None:
            self._compute, self._inputs, self.outputs = compute, inputs, compute(inputs)
            seen.append(inputs)

        def replay(self) -> None:
            for kept, fresh in zip(self.outputs, self._compute(self._inputs), strict=True):
                if kept is not None and fresh is not None:
                    kept.copy_(fresh)

        def drop(self) -> None:
            pass

    def double(given: Inputs) -> Outputs:
        x, y = given["x"], given["y"]
        assert x is not None and y is not None
        return x + y, None

    graphs = Graphs(Twice)
    for key in ("one", "another"):
        results = []
        for number in range(EAGER_CALLS + 3):
            given = {"x": torch.full((3,), float(number)), "y": torch.full((3,), 10.0), "z": None}
            results.append(graphs.call(key, double, given, unshared=("y",)))
        assert [result[0].tolist() for result in results if result[0] is not None] == [
            [10.0 + number] * 3 for number in range(EAGER_CALLS + 3)
        ]
        assert all(result[1] is None for result in results)
    assert seen[0]["x"] is seen[1]["x"] and seen[0]["y"] is not seen[1]["y"]


@pytest.mark.parametrize("setting", ["auto", "never"])
def test_without_a_gpu_layers_are_not_recorded(setting: GraphsSetting, rank_pools: Callable[[int], RankPool]) -> None:
    plan = _plan("gqa", Ring(prefetch=1))
    assert rank_pools(2).run("graph_jobs.setting", plan=plan, setting=setting) == [None, None]


def test_what_cannot_be_always_is_refused(rank_pools: Callable[[int], RankPool]) -> None:
    plan = _plan("gqa", Ring(prefetch=1))
    told = rank_pools(2).run("graph_jobs.setting", plan=plan, setting="always")
    assert told == ["cuda_graphs: need a GPU"] * 2
