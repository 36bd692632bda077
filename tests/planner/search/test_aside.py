"""A second process that scores forward: it changes nothing, says what fails in it, and ends."""

from __future__ import annotations

import multiprocessing

import pytest

from search_cases import problem, refuses
from sparsering.planner.cost.recurrence import CompiledRecurrence
from sparsering.planner.search.aside import forward_scorer
from sparsering.planner.search.problem import Problem
from sparsering.planner.search.selection import GOOD, QUICK, Selection, select
from sparsering.simulator.engine import simulate
from sparsering.traces.errors import InputError, ScheduleError


def told(found: Selection) -> list[object]:
    """Return all that a search says of its candidates, in the order in which it found them."""
    rows = [(str(one), one.step_time_us, one.memory, one.why_not, one.exposed_us) for one in found.table]
    return [rows, str(found.pick.placement), found.pick.forward_layout, found.pick.backward_layout,
            found.pick.step_time_us, found.bound_us, found.notes]  # fmt: skip


def twenty_ranks(kind: str) -> Problem:
    """More ranks than all layouts are tried on."""
    return problem(kind=kind, nodes=5, gpus=4, blocks=40, layers=2, nics=4, nic_bandwidth=200.0, slowdown=0.1)


@pytest.mark.parametrize("kind", ["vertical-slash", "packed-documents"])
def test_a_second_process_changes_nothing(kind: str) -> None:
    many = twenty_ranks(kind)
    with forward_scorer(wanted=True) as aside:
        assert aside is not None
        aside.begin(many, {QUICK: CompiledRecurrence(), GOOD: simulate})
        found = select(many, quick=CompiledRecurrence(), final=simulate, aside=aside)
    assert not multiprocessing.active_children()
    assert told(found) == told(select(many, quick=CompiledRecurrence(), final=simulate))


def test_what_it_raises_is_raised_here() -> None:
    many = twenty_ranks("dense")
    with forward_scorer(wanted=True) as aside:
        assert aside is not None
        aside.begin(many, {QUICK: refuses})
        with pytest.raises(ScheduleError, match="rank 3 waits for ever"):
            select(many, quick=CompiledRecurrence(), aside=aside)
    assert not multiprocessing.active_children()


def test_without_it_the_search_ends_in_one_line() -> None:
    many = twenty_ranks("dense")
    with forward_scorer(wanted=True) as aside:
        assert aside is not None
        aside.begin(many, {QUICK: CompiledRecurrence()})
        (process,) = multiprocessing.active_children()
        process.kill()
        with pytest.raises(InputError, match="--processes: the second process was killed"):
            select(many, quick=CompiledRecurrence(), aside=aside)


def test_nobody_is_started_where_it_is_not_wanted() -> None:
    with forward_scorer(wanted=False) as aside:
        assert aside is None
        assert not multiprocessing.active_children()
