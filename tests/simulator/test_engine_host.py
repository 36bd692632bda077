"""What a layer takes beside its launches, and hosts that issue in order: cases worked out by hand.

All are rings of two on a link of 1 us and a byte a nanosecond, with 3 us a pair forward and 6 us backward: rank 0 has
one task, rank 1 two. Without constants forward takes 8 us and backward 21 (test_engine.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import tiny
from reference_engine import reference
from sparsering.planner.cost.constants import HostPrices, LayerConstants
from sparsering.planner.cost.evaluation import Evaluation
from sparsering.planner.cost.recurrence import CompiledRecurrence
from sparsering.planner.schedule.schedule import DIRECTIONS
from sparsering.simulator.engine import simulate, simulate_layer

BUSY = LayerConstants(delta_us_per_token=0.5, round_us_per_token=0.25, landing_us_per_byte=0.001)
HOST = LayerConstants(host=HostPrices(forward_layer=1.0, backward_layer=1.5, call=0.5))


def spans(cost: tiny.PairCost, direction: Any = "forward") -> list[tuple[float, float, int, str]]:
    """(start, end, rank, stream) of all spans, in order of time."""
    schedule, work = tiny.schedule("ring", 2, direction), tiny.dense_workload(2)
    timeline = simulate(schedule, work, tiny.cluster(), cost, timeline=True).timeline
    assert timeline is not None
    return [(span.start_us, span.end_us, span.rank, span.stream) for span in timeline.spans]


@pytest.mark.parametrize("evaluate", [simulate, reference, CompiledRecurrence()])
def test_streams_are_busy_before_between_and_after(evaluate: Callable[..., Evaluation]) -> None:
    # 4 tokens: 2 us before all else, and 1 us at the end; the 8,000 bytes of dK/dV that land are added in 8 us
    cost, work = tiny.BusyCost(constants=BUSY), tiny.dense_workload(2)
    found = evaluate(tiny.schedule("ring", 2, "backward"), work, tiny.cluster(), cost)
    assert found.makespan_us == 2 + 21 + 8 + 1
    assert found.compute_us.tolist() == [6.0, 12.0]  # launches alone
    assert evaluate(tiny.schedule("ring", 2), work, tiny.cluster(), cost).makespan_us == 8


def test_what_comes_first_keeps_calls_back() -> None:
    calls = [span for span in spans(tiny.BusyCost(constants=BUSY), "backward") if span[3] == "ring"]
    assert calls == [(2.0, 7.0, 0, "ring"), (2.0, 7.0, 1, "ring")]


def test_a_quick_host_issues_the_first_launch_before_the_first_calls() -> None:
    # issued at 1 + 2 the first launch, half a microsecond later the call; the second launch at 5.5, and it waits
    assert spans(tiny.BusyCost(constants=HOST, us_to_issue=2.0)) == [
        (3.0, 6.0, 0, "compute"),
        (3.0, 6.0, 1, "compute"),
        (3.5, 8.5, 0, "ring"),
        (3.5, 8.5, 1, "ring"),
        (8.5, 11.5, 1, "compute"),
    ]


def test_a_slow_host_keeps_the_device_waiting() -> None:
    # the second launch is issued at 1 + 20 + 0.5 + 20
    assert spans(tiny.BusyCost(constants=HOST, us_to_issue=20.0)) == [
        (21.0, 24.0, 0, "compute"),
        (21.0, 24.0, 1, "compute"),
        (21.5, 26.5, 0, "ring"),
        (21.5, 26.5, 1, "ring"),
        (41.5, 44.5, 1, "compute"),
    ]


def test_calls_of_later_phases_are_issued_before_their_launches() -> None:
    # Of 1.5 us half come before the launches: 0.75 + 20 for the first, 0.5 for the call, 20 for the second, 0.5 for the
    # gradients. A launch of 6 us ends no sooner than 3 after it is issued: the first at 23.75, the second at 44.25.
    found = spans(tiny.BusyCost(constants=HOST, us_to_issue=20.0), "backward")
    assert [span for span in found if span[3] == "ring_grad"] == [
        (26.25, 53.25, 0, "ring_grad"),  # rank 0 has waited for K and V, which come 5 us after 21.25
        (44.25, 53.25, 1, "ring_grad"),
    ]


def test_the_host_has_a_lead_when_backward_follows_forward() -> None:
    forward, backward = (tiny.schedule("ring", 2, direction) for direction in DIRECTIONS)
    inputs = (forward, backward), tiny.dense_workload(2), tiny.cluster()
    layer = simulate_layer(*inputs, tiny.BusyCost(constants=HOST, us_to_issue=2.0), timeline=True)
    # forward as above; its hosts had issued all after 3.5 and 5.5 us, so backward's is issued before it begins
    assert (layer.forward.makespan_us, layer.backward.makespan_us) == (11.5, 21.0)
    assert layer.makespan_us == 32.5
    assert layer.timeline is not None and layer.timeline.makespan_us == 32.5 - 3.0  # from the first span on
    # alone: 0.75 + 2 + 0.5 until the call is issued, 5 us until K/V are there, the second launch, gradients in 9 us
    assert layer.backward_alone_us == 3.25 + 5 + 6 + 9
    ahead = simulate_layer(*inputs, tiny.PairCost())
    assert ahead.backward_alone_us == ahead.backward.makespan_us == 21.0


def test_a_backward_launch_begins_while_its_host_issues_it() -> None:
    first = next(span for span in spans(tiny.BusyCost(constants=HOST, us_to_issue=2.0), "backward"))
    assert first == (0.75, 6.75, 0, "compute")
    slow = next(span for span in spans(tiny.BusyCost(constants=HOST, us_to_issue=20.0), "backward"))
    assert slow == (0.75, 23.75, 0, "compute")


def test_a_host_that_is_behind_goes_on_where_it_is() -> None:
    forward, backward = (tiny.schedule("ring", 2, direction) for direction in DIRECTIONS)
    cost = tiny.BusyCost(constants=HOST, us_to_issue=20.0)
    layer = simulate_layer((forward, backward), tiny.dense_workload(2), tiny.cluster(), cost)
    # rank 1 has issued forward at 41.5, 3 us before it ends: all that it issues in backward comes 3 us earlier
    assert layer.forward.makespan_us == 44.5
    assert layer.backward_alone_us - layer.backward.makespan_us == 3.0
