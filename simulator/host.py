"""The host of one rank: when it has issued what, which is not before it has issued all that comes before."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ..planner.cost.constants import HostPrices
from ..planner.cost.timing import NS_PER_US
from ..planner.schedule.schedule import Direction, Phase

# A backward launch is several kernels: the device begins with the first while the host goes on to issue the others.
# The last ones, dK and dV, take about half of it. A forward launch is one kernel, after its index.
LAST_KERNELS_SHARE = {"forward": 1.0, "backward": 0.5}
# Of what the host does in a layer beside launches and calls; the rest comes after them.
BEFORE_LAUNCHES_SHARE = {"forward": 1.0, "backward": 0.5}


class Host:
    """What one rank's host issues in one direction of a layer; it never waits for the device.

    issued_ns: when it has issued all that it has come to. prices: None for a host that is always ahead.
    """

    __slots__ = ("_direction", "_launches", "_prices", "issued_ns")

    def __init__(self, prices: HostPrices | None, direction: Direction, begins_ns: int) -> None:
        self._prices, self._direction, self.issued_ns = prices, direction, begins_ns
        self._launches: Iterator[tuple[int, int]] = iter(())  # when each has been issued, and how long that took
        self._beside(BEFORE_LAUNCHES_SHARE[direction])

    def issue(self, phase: Phase, launches_ns: Sequence[int]) -> list[int] | None:
        """Issue a phase: its calls, then its launches, in the first phase the reverse; return when each call was."""
        if self._prices is None:
            return None
        calls_ns = [round(self._prices.call * NS_PER_US)] * len(phase.group_calls)
        issued: dict[bool, list[int]] = {True: [], False: []}
        first_phase = phase.index == 0
        for are_calls in (not first_phase, first_phase):
            for duration_ns in calls_ns if are_calls else launches_ns:
                self.issued_ns += duration_ns
                issued[are_calls].append(self.issued_ns)
        self._launches = iter(list(zip(issued[False], launches_ns, strict=True)))
        return issued[True]

    def next_launch(self, now_ns: int, work_ns: int) -> tuple[int, float]:
        """Return when the next launch of the phase begins on the device, and for how long it lasts there.

        work_ns: how long it takes where the host is ahead.
        """
        issued_ns, issuing_ns = next(self._launches, (now_ns, 0))
        share = LAST_KERNELS_SHARE[self._direction]
        begins_ns = max(now_ns, issued_ns - (issuing_ns if share < 1 else 0))
        return begins_ns, max(float(work_ns), issued_ns + share * work_ns - begins_ns)

    def finish(self, now_ns: int) -> int:
        """Issue what follows the launches; return how long a device that has come to its end waits for it."""
        self._beside(1.0 - BEFORE_LAUNCHES_SHARE[self._direction])
        return 0 if self._prices is None else max(0, self.issued_ns - now_ns)

    def _beside(self, share: float) -> None:
        if self._prices is not None:
            forward = self._direction == "forward"
            layer_us = self._prices.forward_layer if forward else self._prices.backward_layer
            self.issued_ns += round(share * layer_us * NS_PER_US)
