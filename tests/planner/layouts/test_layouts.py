"""Every registered layout, whatever its parameters: proved by `check`, and played in random orders."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import asdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layout_cases import layout_shape, layout_values, layouts_for
from schedule_player import Player
from sparsering.planner.check.check import check, check_step
from sparsering.planner.layouts.gather import Gather
from sparsering.planner.layouts.hierarchical import Hierarchical
from sparsering.planner.layouts.layout import Layout
from sparsering.planner.schedule.schedule import DIRECTIONS, Direction, phases_json
from sparsering.traces.files import canonical_json

TABLE = [
    pytest.param(world_size, layout, id=f"{world_size}-{layout.text}")
    for world_size in (1, 2, 3, 4, 6, 8)
    for layout in layouts_for(layout_shape(world_size))
]


@pytest.mark.parametrize(("world_size", "layout"), TABLE)
def test_every_layout_is_proved(world_size: int, layout: Layout) -> None:
    for columns in (0, 64):
        shape = layout_shape(world_size, columns)
        schedules = [layout.build(shape=shape, direction=direction) for direction in DIRECTIONS]
        for schedule in schedules:
            report = check(schedule)
            assert report.peak_bytes <= schedule.buffer_bytes
            assert report.tasks == layout.head_groups * (world_size**2 + world_size * bool(columns))
            assert schedule.layout == layout.name
            for rank in range(world_size):
                phases = schedule.phases(rank)
                assert phases_json(phases) == canonical_json([asdict(phase) for phase in phases])
        check_step(*schedules)
        assert (layout.kept_slots is not None) >= any(schedules[0].kept(rank) for rank in range(world_size))


@pytest.mark.parametrize("layout", [Hierarchical(inner_size=8), Gather(chunks=4)], ids=str)
def test_32_ranks_are_proved_in_seconds(layout: Layout) -> None:
    schedule = layout.build(shape=layout_shape(32, 64), direction="backward")
    start = time.process_time()
    report = check(schedule)
    assert time.process_time() - start < 5
    # 31 of 32 K/V and as many dK/dV to move per rank, and one sum of columns
    assert report.transfers == 2 * 32 * 31 + 1


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_layouts_that_keep_in_the_same_slots_go_together(direction: Direction) -> None:
    """Whatever else differs between two values of one kind, what forward keeps is what backward begins with."""
    shape = layout_shape(4)
    held: dict[object, set[str]] = {}
    for layout in layouts_for(shape):
        kept = layout.build(shape=shape, direction=direction).kept
        held.setdefault(layout.kept_slots, set()).add(str([kept(rank) for rank in range(4)]))
    assert {slots: len(kinds) for slots, kinds in held.items() if len(kinds) > 1} == {}


@given(data=st.data())
def test_layouts_played_in_random_orders_bring_everything_home(data: st.DataObject) -> None:
    """Every pair once for each head group, results and gradients."""
    world_size = data.draw(st.integers(1, 6))
    columns = data.draw(st.sampled_from([0, 64]))
    layout = data.draw(layout_values(layout_shape(world_size)))
    direction = data.draw(st.sampled_from(DIRECTIONS))
    schedule = layout.build(shape=layout_shape(world_size, columns), direction=direction)
    player = Player(schedule, data.draw(st.randoms(use_true_random=False)))
    player.play()
    groups = layout.head_groups
    every = [part for part in range(world_size) for _ in range(groups)]
    for rank, held in enumerate(player.held):
        seen = every + [-1] * groups * bool(columns)
        assert held["out:home"] == Counter(("out", rank, key) for key in seen)
        if direction == "backward":
            assert held["dkv:home"] == Counter(("grad", query, rank) for query in every)
            if columns:
                assert held["dcolumns:sum"] == Counter(("grad", query, -1) for query in every)
