"""`check` accepts what every registered layout builds and rejects every mutation of it.

A mutation is a function that lists the *sites* where it applies; each site makes one mutated schedule. What would leave
an equivalent program (a landing slot exchanged for a free one, a wait moved to before its first use) is no site.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import gradient_mutations as of_gradients
import task_mutations as of_tasks
import transfer_mutations as of_transfers
from layout_cases import layout_shape, layout_values
from schedule_edits import Mutant, every_transfer
from sparsering.planner.check.check import check
from sparsering.planner.check.rules import every_phase
from sparsering.planner.schedule.pairs import Pairs
from sparsering.planner.schedule.schedule import DIRECTIONS, Schedule
from sparsering.traces.errors import ScheduleError


@st.composite
def schedules(draw: st.DrawFn) -> Schedule:
    shape = layout_shape(draw(st.integers(1, 6)), draw(st.sampled_from([0, 32])))
    return draw(layout_values(shape)).build(shape=shape, direction=draw(st.sampled_from(DIRECTIONS)))


@st.composite
def reduced_schedules(draw: st.DrawFn) -> tuple[Schedule, Pairs]:
    """A schedule of a layout that leaves pairs out, and the pairs that it has."""
    world_size = draw(st.integers(2, 6))
    rows = draw(st.lists(st.lists(st.booleans(), min_size=world_size, max_size=world_size), min_size=world_size,
                         max_size=world_size))  # fmt: skip
    pairs, shape = Pairs.of(np.array(rows)), layout_shape(world_size, draw(st.sampled_from([0, 32])))
    layout = draw(layout_values(shape, leaves_out=True))
    return layout.build(shape=shape, direction=draw(st.sampled_from(DIRECTIONS)), pairs=pairs), pairs


MUTATIONS = [
    of_transfers.drop_transfer,
    of_transfers.drop_group_call,
    of_transfers.swap_transfer_buffer,
    of_transfers.wrong_accumulate_into,
    of_transfers.wrong_transfer_shard,
    of_transfers.ends_disagree,
    of_transfers.too_small_capacity,
    of_transfers.buffer_not_stated,
    of_tasks.drop_task,
    of_tasks.duplicate_task,
    of_tasks.move_task_to_another_rank,
    of_tasks.swap_task_buffer,
    of_tasks.wrong_task_shard,
    of_tasks.wrong_heads,
    of_tasks.remove_wait,
    of_tasks.repeat_wait,
    of_tasks.wait_before_launch,
    of_tasks.wait_after_first_use,
    of_tasks.swap_communicators,
    of_tasks.swap_calls,
    of_tasks.launch_on_foreign_ranks,
    of_gradients.gradients_stay_where_they_land,
    of_gradients.gradients_land_where_nothing_takes_them,
    of_gradients.gradients_sent_twice,
    of_gradients.column_gradients_lost,
]


@given(schedule=schedules())
def test_every_built_schedule_is_accepted(schedule: Schedule) -> None:
    check(schedule)


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.__name__)
@given(data=st.data())
@settings(suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow])
def test_every_mutation_is_rejected(mutation: Callable[[Schedule], Iterator[Mutant]], data: st.DataObject) -> None:
    schedule = data.draw(schedules())
    sites = list(mutation(schedule))
    assume(sites)
    mutant = data.draw(st.sampled_from(sites))()
    with pytest.raises(ScheduleError):
        check(mutant)


@given(made=reduced_schedules())
def test_every_reduced_schedule_is_accepted_and_nothing_in_it_is_idle(made: tuple[Schedule, Pairs]) -> None:
    schedule, pairs = made
    report = check(schedule, inactive=pairs.left_out())
    has_columns = any(transfer.kind == "columns" for transfer in every_transfer(schedule))
    groups = 1 + max(task.query.head_group for _, phase in every_phase(schedule) for task in phase.tasks)
    assert report.tasks == groups * (int(pairs.matrix.sum()) + has_columns * schedule.world_size)
    used = {name for transfer in every_transfer(schedule) for name in (transfer.source_buffer, transfer.buffer)}
    stated = {buffer.name for buffer in schedule.buffers if buffer.name.startswith("kv")}
    assert stated - {"kv:home"} <= used


REDUCED_MUTATIONS = [
    of_tasks.swap_calls_of_one_route if mutation is of_tasks.swap_calls else mutation for mutation in MUTATIONS
]


@pytest.mark.parametrize("mutation", REDUCED_MUTATIONS, ids=lambda mutation: mutation.__name__)
@given(data=st.data())
@settings(suppress_health_check=[HealthCheck.filter_too_much])
def test_every_mutation_of_a_reduced_schedule_is_rejected(
    mutation: Callable[[Schedule], Iterator[Mutant]], data: st.DataObject
) -> None:
    schedule, pairs = data.draw(reduced_schedules())
    sites = list(mutation(schedule))
    assume(sites)
    mutant = data.draw(st.sampled_from(sites))()
    with pytest.raises(ScheduleError):
        check(mutant, inactive=pairs.left_out())
