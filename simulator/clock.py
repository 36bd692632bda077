"""Simulated time: events in order of their nanosecond, and within one nanosecond in that in which they were queued.

An event is a function without arguments. Those of one nanosecond lie in one list, so the heap holds every moment once,
and what an event queues for its own moment runs after all that was queued before it. Beginnings of processes alone go
first: they run when the event that makes them is over.
"""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop, heappush

Event = Callable[[], None]


class Clock:
    """The moment that is played, and everything that is still to come. now: nanoseconds."""

    __slots__ = ("_at", "_moments", "first", "now", "queue")

    def __init__(self) -> None:
        self.now = 0
        self.queue: list[Event] = []  # the events of this moment, in order; those played already come first
        self.first: list[Event] = []  # what runs as soon as the event that is played has ended
        self._at: dict[int, list[Event]] = {}
        self._moments: list[int] = []

    def after(self, delay_ns: int, event: Event) -> None:
        """Queue an event for so many nanoseconds from now."""
        if not delay_ns:
            self.queue.append(event)
            return
        moment = self.now + delay_ns
        queued = self._at.get(moment)
        if queued is None:
            self._at[moment] = [event]
            heappush(self._moments, moment)
        else:
            queued.append(event)

    def run(self) -> None:
        """Play until nothing is left."""
        first, queued, moments = self.first, self._at, self._moments
        self._play_first()
        while True:
            for event in self.queue:  # it grows meanwhile
                event()
                if first:
                    self._play_first()
            if not moments:
                return
            self.now = heappop(moments)
            self.queue = queued.pop(self.now)

    def _play_first(self) -> None:
        for event in self.first:  # it grows meanwhile
            event()
        self.first.clear()
