"""What `check` proves and the runtime does not play is refused, by name."""

from __future__ import annotations

from dataclasses import replace

import pytest

from schedule_cases import (
    backward,
    gradients_home,
    helped,
    ring,
    with_tasks,
)
from sparsering.planner.check_playable import check_playable
from sparsering.planner.schedule import (
    DCOLUMNS_HOME,
    ShardId,
)
from sparsering.traces.errors import UnsupportedError


def test_the_runtime_refuses_what_it_would_play_otherwise() -> None:
    """All of these are proved, and may be simulated."""
    for rank in range(3):
        check_playable(backward(gradients_home()), rank)
    with pytest.raises(UnsupportedError, match=r"slots 0, landing are not numbered from 0"):
        check_playable(helped(), 1)
    numbered = replace(helped(), buffers=())
    with pytest.raises(UnsupportedError, match=r"rank 1, phase 0, transfer q/0.0/0>1/0: q stays with its rank"):
        check_playable(numbered, 1)
    schedule = ring(2, "backward", columns=32)
    phase = schedule.phases(1)[0]
    halves = [replace(task, heads=heads) for task in phase.tasks for heads in ((0, 2), (2, 4))]
    with pytest.raises(UnsupportedError, match=r"task 1.0xcolumns heads 0:2: all 4 heads are computed together"):
        check_playable(with_tasks(schedule, 1, phase, tuple(halves)), 1)
    task = phase.tasks[0]
    for changed, problem in (
        (replace(task, query=ShardId(sequence_part=0)), "a rank computes its own queries"),
        (replace(task, out_buffer="out:0"), "reads q:home and adds to out:0, not q:home and out:home"),
        (replace(task, grad_buffer="columns:0"), f"gradients of columns are added to {DCOLUMNS_HOME}, not columns:0"),
    ):
        with pytest.raises(UnsupportedError, match=problem):
            check_playable(with_tasks(schedule, 1, phase, (changed,)), 1)
