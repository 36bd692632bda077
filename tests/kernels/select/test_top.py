"""Taking the highest scores, against plain Python."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from select_cases import numpy_diagonals
from sparsering.kernels.select.top import counts_for_mass, diagonals_of, highest, positions_of, take_highest


@given(scores=st.lists(st.integers(0, 4), min_size=1, max_size=30), count=st.integers(0, 30))
def test_ties_go_to_the_lower_index(scores, count):
    tensor = torch.tensor([scores], dtype=torch.float32)
    count = min(count, len(scores))
    taken = take_highest(tensor, torch.tensor([count]), highest(tensor, max(count, 1)))
    wanted = sorted(sorted(range(len(scores)), key=lambda at: (-scores[at], at))[:count])
    assert taken[0].nonzero().flatten().tolist() == wanted
    assert positions_of(taken, 30).tolist() == [wanted + [len(scores)] * (30 - count)]


@given(scores=st.lists(st.integers(0, 9), min_size=1, max_size=20), cap=st.integers(1, 20), tenths=st.integers(1, 10))
def test_the_smallest_set_with_the_mass(scores, cap, tenths):
    tensor = torch.tensor([scores], dtype=torch.float64)
    total = sum(scores)
    count = int(counts_for_mass(highest(tensor, cap), tensor.sum(-1), torch.tensor([tenths / 10]).double()))
    best = sorted(scores, reverse=True)
    enough = [n for n in range(1, len(scores) + 1) if sum(best[:n]) * 10 >= tenths * total]
    assert count == min(enough[0], cap, len(scores))


@given(distances=st.sets(st.integers(0, 49)), length=st.integers(1, 50), block=st.integers(1, 9))
def test_a_distance_activates_the_two_diagonals_it_touches(distances, length, block):
    kept = sorted(d for d in distances if d < length)
    tensor = torch.zeros(1, length, dtype=torch.bool)
    tensor[0, kept] = True
    assert diagonals_of(tensor, block)[0].nonzero().flatten().tolist() == numpy_diagonals(kept, block, length)
