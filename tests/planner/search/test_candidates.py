"""What a search looks at: placements and layouts, by cluster and by what is allowed."""

from __future__ import annotations

from typing import Any

import pytest

import tiny
from search_cases import problem
from sparsering.planner.cost.cluster import Cluster
from sparsering.planner.cost.recurrence import CompiledRecurrence
from sparsering.planner.layouts.layout import Offers
from sparsering.planner.layouts.registry import known_layouts
from sparsering.planner.search.candidates import baselines, layout_choices, placement_choices
from sparsering.planner.search.problem import SearchSpace
from sparsering.planner.search.sampling import evenly_spread
from sparsering.planner.search.selection import select
from sparsering.traces.errors import InputError


def test_pulls_and_rounded_gradients_are_looked_at_where_they_may_be():
    def gathers(cluster: Cluster, **allowed: Any) -> set[str]:
        return {str(one) for one in layout_choices(SearchSpace(layouts=("gather",), **allowed).offers(cluster))}

    pulling, split = tiny.cluster(pull_bandwidth=2000.0), tiny.cluster(nodes=2, gpus=2, pull_bandwidth=2000.0)
    plain = gathers(tiny.cluster())
    assert gathers(split) == plain == gathers(pulling, pulls=False)
    pulls = {f"gather (chunks {count}, {kept}pull)" for count in (1, 2) for kept in ("", "keep_kv, ")}
    assert gathers(pulling) - plain == pulls
    rounded = {name.replace("pull", "narrow_gradients") for name in pulls}
    assert gathers(split, narrow_gradients=True) - plain == rounded
    both = {name.replace("pull", "pull, narrow_gradients") for name in pulls}
    assert gathers(pulling, narrow_gradients=True) - plain == pulls | rounded | both


def test_candidates_of_four_nodes_of_eight():
    cluster = tiny.cluster(nodes=4, gpus=8)
    offers = SearchSpace().offers(cluster)
    names = [str(choice) for choice in layout_choices(offers)]
    assert names == [
        "gather (chunks 1)", "gather (chunks 2)", "gather (chunks 4)", "gather (chunks 31)",
        "ring (prefetch 1)", "ring (prefetch 2)",
        "hierarchical (inner_size 8)", "hierarchical (inner_size 4)", "hierarchical (inner_size 16)",
        "hierarchical (inner_size 2)", "collective",
        *(f"gather (chunks {count}, keep_kv)" for count in (1, 2, 4, 31)),
        "two_level (inner_size 8)", "two_level (inner_size 4)",
        "two_level (inner_size 8, halves)", "two_level (inner_size 4, halves)",
        "two_level (inner_size 8, halves, late_columns)", "two_level (inner_size 4, halves, late_columns)",
        *(f"ulysses (degree {degree}, chunks {chunks})" for degree in (2, 4, 8, 32) for chunks in (1, 2, 4)),
    ]  # fmt: skip
    long = problem().attention.model_copy(update={"seq_len_tokens": 512 * 1024, "block_size": 128})
    choices = placement_choices(long, world_size=32)
    assert {(choice.name, choice.granularity_tokens) for choice in choices} == {
        ("contiguous", 128), ("zigzag", 128), ("striped", 1),
        *((name, size) for name in ("striped", "balanced") for size in (128, 256, 512, 1024)),
    }  # fmt: skip
    plain = [f"{placement}, {layout}" for placement, layout in baselines(offers, block_size=128)]
    assert plain == [
        *(f"striped (128 tokens), gather (chunks {count})" for count in (1, 2, 4, 31)),
        "striped (128 tokens), ring (prefetch 1)",
        "zigzag (128 tokens), ring (prefetch 1)",
        "contiguous (128 tokens), ring (prefetch 1)",
        "striped (128 tokens), hierarchical (inner_size 8)",
    ]


def test_coarse_units_that_would_pad_a_lot_are_left_out():
    short = problem().attention.model_copy(update={"seq_len_tokens": 8192, "block_size": 128})
    assert {choice.granularity_tokens for choice in placement_choices(short, world_size=32)} == {1, 128, 256}


@pytest.mark.parametrize(("nodes", "gpus", "expected"), [(1, 1, []), (1, 2, []), (1, 8, [4, 2]), (2, 2, [2])])
def test_inner_sizes(nodes: int, gpus: int, expected: list[int]):
    assert Offers(nodes=nodes, gpus_per_node=gpus).inner_sizes == expected


def test_what_layouts_propose_they_can_be_and_plain_ones_keep_and_split_nothing():
    offers = Offers(nodes=2, gpus_per_node=4, pulls=True, rounds_parts=True, rounds_sums=True)
    for layout in known_layouts():
        for one in layout.candidates(offers):
            assert one.candidates(offers).count(one) == 1
        for _, plain in layout.baselines(offers):
            assert (plain.kept_slots, plain.head_groups, plain.margin) == (None, 1, 0.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layouts": ("spiral",)}, "layout: 'spiral' is not one of gather, ring, hierarchical"),
        ({"placements": ("random",)}, "placement: 'random' is not one of"),
        ({"memory_fraction": 0.0}, "memory_fraction: must be above 0 and at most 1, not 0.0"),
        ({"memory_limit_bytes": 0}, "memory_limit_bytes: must be positive, not 0"),
        ({"narrow_gradients": True, "dtype": "float32"}, "narrow_gradients: sums are kept in float32 as it is"),
    ],
)
def test_what_cannot_be_picked_is_refused(changes: dict[str, Any], message: str):
    with pytest.raises(InputError, match=message):
        SearchSpace(**changes)


def test_token_striping_of_long_sequences_is_left_out_and_said(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sparsering.planner.search.selection.MAX_TOKEN_STRIPING_TOKENS", 512)
    found = select(problem(blocks=16), quick=CompiledRecurrence())
    assert not any(step.placement.granularity_tokens == 1 for step in found.table)
    assert "token striping is not looked at beyond 512 tokens" in found.notes


def test_evenly_spread():
    assert evenly_spread(range(36), 4) == [0, 12, 23, 35]
    assert evenly_spread([3, 5], 4) == [3, 5]
    assert evenly_spread(range(9), 1) == [4]
