"""What a search looks at: placements and layouts, by cluster and by what is allowed."""

from __future__ import annotations

import pytest

import tiny
from search_cases import problem
from sparsering.planner.cost.cluster import Cluster
from sparsering.planner.cost.compiled import CompiledRecurrence
from sparsering.planner.search.candidates import (
    LayoutChoice,
    baselines,
    inner_sizes,
    layout_choices,
    placement_choices,
)
from sparsering.planner.search.selection import select
from sparsering.traces.errors import InputError


def test_pulls_and_rounded_gradients_are_looked_at_where_they_may_be():
    def gathers(cluster: Cluster, **allowed: bool) -> set[str]:
        return {str(one) for one in layout_choices(cluster=cluster, names=["gather"], **allowed)}

    pulling, split = tiny.cluster(pull_bandwidth=2000.0), tiny.cluster(nodes=2, gpus=2, pull_bandwidth=2000.0)
    plain = gathers(tiny.cluster())
    assert gathers(split) == plain == gathers(pulling, pulls=False)
    pulls = {f"gather (chunks {count}, {kept}pull 1)" for count in (1, 2) for kept in ("", "keep_kv 1, ")}
    assert gathers(pulling) - plain == pulls
    rounded = {name.replace("pull", "narrow_grads") for name in pulls}
    assert gathers(split, narrow_gradients=True) - plain == rounded
    both = {name.replace("pull", "narrow_grads 1, pull") for name in pulls}
    assert gathers(pulling, narrow_gradients=True) - plain == pulls | rounded | both


def test_places_of_a_node_cross_in_turns_where_they_share_a_card():
    def two_levels(cluster: Cluster) -> set[str]:
        return {str(one) for one in layout_choices(cluster=cluster, names=["two_level"])}

    shared, own = (tiny.cluster(nodes=2, gpus=4, nics=nics) for nics in (1, 4))
    assert two_levels(shared) - two_levels(own) == {
        "two_level (chunks 2, inner_size 2)", "two_level (chunks 2, inner_size 4)",
    }  # fmt: skip


def test_candidates_of_four_nodes_of_eight():
    cluster = tiny.cluster(nodes=4, gpus=8)
    names = [str(choice) for choice in layout_choices(cluster=cluster)]
    assert names == [
        "gather (chunks 1)", "gather (chunks 2)", "gather (chunks 4)", "gather (chunks 31)",
        "ring (prefetch 1)", "ring (prefetch 2)", "ring (prefetch 3)",
        "hierarchical (inner_size 8)", "hierarchical (inner_size 4)", "hierarchical (inner_size 16)",
        "hierarchical (inner_size 2)", "two_level (inner_size 8)", "two_level (inner_size 4)",
        "two_level (halves 1, inner_size 8)", "two_level (halves 1, inner_size 4)",
        "two_level (chunks 2, inner_size 8)", "two_level (chunks 2, inner_size 4)", "collective",
        "collective (chunks 2)", *(f"gather (chunks {count}, keep_kv 1)" for count in (1, 2, 4, 31)),
        *(f"ulysses (chunks {chunks}, degree {degree})" for degree in (2, 4, 8, 32) for chunks in (1, 2, 4)),
    ]  # fmt: skip
    choices = placement_choices(seq_len_tokens=512 * 1024, world_size=32, block_size=128)
    assert {(choice.name, choice.granularity_tokens) for choice in choices} == {
        ("contiguous", 128), ("zigzag", 128), ("striped", 1),
        *((name, size) for name in ("striped", "balanced") for size in (128, 256, 512, 1024)),
    }  # fmt: skip
    plain = [str(one) for one in baselines(cluster=cluster, block_size=128)]
    assert plain == [
        *(f"striped (128 tokens), gather (chunks {count})" for count in (1, 2, 4, 31)),
        "striped (128 tokens), ring (prefetch 1)",
        "zigzag (128 tokens), ring (prefetch 1)",
        "contiguous (128 tokens), ring (prefetch 1)",
        "striped (128 tokens), hierarchical (inner_size 8)",
    ]


def test_coarse_units_that_would_pad_a_lot_are_left_out():
    choices = placement_choices(seq_len_tokens=8192, world_size=32, block_size=128)
    assert {choice.granularity_tokens for choice in choices} == {1, 128, 256}


@pytest.mark.parametrize(("nodes", "gpus", "expected"), [(1, 1, []), (1, 2, []), (1, 8, [4, 2]), (2, 2, [2])])
def test_inner_sizes(nodes: int, gpus: int, expected: list[int]):
    assert inner_sizes(tiny.cluster(nodes=nodes, gpus=gpus)) == expected


def test_unknown_names_are_refused():
    with pytest.raises(
        InputError, match="layout: 'spiral' is not one of ring, gather, hierarchical, two_level, collective, ulysses"
    ):
        select(problem(), quick=CompiledRecurrence(), layouts=["spiral"])
    with pytest.raises(InputError, match="placement: 'random' is not one of"):
        select(problem(), quick=CompiledRecurrence(), placements=["random"])


def test_choices_name_themselves():
    layout = LayoutChoice(layout="ring", parameters=(("prefetch", 2),))
    assert (str(layout), str(LayoutChoice(layout="ulysses", parameters=()))) == ("ring (prefetch 2)", "ulysses")
