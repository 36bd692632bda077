"""Searches on more ranks than all layouts are tried on."""

from __future__ import annotations

import pytest

from search_cases import problem
from sparsering.planner.cost.recurrence import CompiledRecurrence
from sparsering.planner.search import estimates, selection
from sparsering.planner.search.selection import select
from sparsering.simulator.engine import simulate


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dense", "vertical-slash", "skewed", "packed-documents"])
def test_what_is_left_out_on_many_ranks_would_not_have_been_picked(kind: str, monkeypatch: pytest.MonkeyPatch):
    """Twenty ranks: most candidates are neither built nor simulated, and the pick is that of looking at all."""
    many = problem(kind=kind, nodes=5, gpus=4, blocks=80, layers=3, nics=4, nic_bandwidth=200.0, slowdown=0.1)
    found = select(many, quick=CompiledRecurrence(), final=simulate)
    for module in (estimates, selection):
        monkeypatch.setattr(module, "ALL_PLACED_RANKS", 1000)
    every = select(many, quick=CompiledRecurrence(), final=simulate)
    assert len(found.table) < len(every.table)
    assert found.pick.step_time_us <= every.pick.step_time_us
    assert found.bound_us == every.bound_us
