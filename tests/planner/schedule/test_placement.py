"""Placements: permutations with equal counts, balance, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsering.planner.schedule.placement import REGULAR_PLACEMENTS, Placement, balanced
from sparsering.traces.errors import InputError

sizes = st.tuples(st.integers(1, 500), st.integers(1, 9), st.integers(1, 20))


@given(sizes, st.sampled_from(sorted(REGULAR_PLACEMENTS)))
def test_regular_placements_are_permutations_with_equal_counts(size: tuple[int, int, int], name: str) -> None:
    tokens, world, granularity = size
    placement = REGULAR_PLACEMENTS[name](seq_len_tokens=tokens, world_size=world, granularity_tokens=granularity)
    check(placement, tokens, world)
    # no more padding than rounding up needs: less than one unit a rank, or two for the two stretches of a zigzag
    assert placement.padded_tokens - tokens < world * granularity * (2 if name == "zigzag" else 1)


def check(placement: Placement, tokens: int, world: int) -> None:
    positions = [placement.positions(rank) for rank in range(world)]
    assert {len(part) for part in positions} == {placement.tokens_per_rank}
    assert all((np.diff(part) > 0).all() for part in positions)
    assert np.array_equal(np.sort(placement.permutation()), np.arange(placement.padded_tokens))
    assert placement.padded_tokens >= tokens
    owner = placement.owner_of_tokens()
    assert all((owner[part] == rank).all() for rank, part in enumerate(positions))


@given(sizes, st.data())
def test_balanced_is_a_permutation_within_the_bound_of_longest_processing_time(
    size: tuple[int, int, int], data: st.DataObject
) -> None:
    """Every rank is at most one unit above the mean of those that still had room: max <= mean + the largest unit."""
    tokens, world, granularity = size
    units = -(-tokens // granularity)
    load = np.array(data.draw(st.lists(st.integers(0, 1000), min_size=units, max_size=units)), dtype=np.float64)
    placement = balanced(seq_len_tokens=tokens, world_size=world, granularity_tokens=granularity, unit_load=load)
    check(placement, tokens, world)
    padded = np.zeros(placement.units.size)
    padded[:units] = load
    totals = padded[placement.units].sum(axis=1)
    assert totals.sum() == load.sum()
    assert totals.max() <= load.sum() / world + load.max()


def test_balanced_beats_striping_on_a_load_that_repeats_with_the_ranks() -> None:
    load = np.array([9.0, 1.0, 1.0, 1.0] * 4)
    placement = balanced(seq_len_tokens=16, world_size=4, granularity_tokens=1, unit_load=load)
    assert load[placement.units].sum(axis=1).tolist() == [12.0] * 4


def test_examples() -> None:
    def units(name: str) -> list[list[int]]:
        return REGULAR_PLACEMENTS[name](seq_len_tokens=8, world_size=2, granularity_tokens=1).units.tolist()

    assert units("contiguous") == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert units("zigzag") == [[0, 1, 6, 7], [2, 3, 4, 5]]
    assert units("striped") == [[0, 2, 4, 6], [1, 3, 5, 7]]


@pytest.mark.parametrize(
    ("units", "message"),
    [
        ([[0, 1], [1, 2]], "owned by exactly one rank"),
        ([0, 1], "needs units"),
        ([[0], [1]], "do not cover 9 tokens"),
    ],
)
def test_impossible_ownership_is_refused(units: list, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Placement(name="mine", seq_len_tokens=9, granularity_tokens=2, units=np.array(units))


def test_a_load_longer_than_the_sequence_is_refused() -> None:
    with pytest.raises(InputError, match="unit_load"):
        balanced(seq_len_tokens=4, world_size=2, granularity_tokens=1, unit_load=np.ones(5))
