"""How long attention's compute waits for other ranks in a training step: its exposed communication.

On GPUs two events stand around every point where the compute stream waits for messages: it reaches the first when all
earlier kernels are done, the second when the messages have landed too. On CPUs it is the time for which the computing
thread stands still. A late rank shows on those that wait for it. Off, nothing is marked; on, nothing is synchronised.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..comm.channels import Channel, Message, Pending
from .spans import Clock


class Exposure:
    """Marks around the waits of this rank, taken while it is `on`.

    waits: (before, after) of each wait since the last reading, as the clock marks time.
    """

    def __init__(self, device: torch.device) -> None:
        self.on = False
        self.waits: list[tuple[Any, Any]] = []
        self._clock = Clock(device)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count what the block enqueues (GPUs) or lasts (CPUs): nothing but waiting may stand in it."""
        if not self.on:
            yield
            return
        before = self._clock.mark()
        yield
        self.waits.append((before, self._clock.mark()))

    def channels(self, channels: Mapping[str, Channel]) -> dict[str, Channel]:
        """Return the channels, their waits counted."""
        return {name: _MeteredChannel(channel, self) for name, channel in channels.items()}

    def reduction(self, reduce: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """Return a reduction over ranks, counted whole: compute cannot go on before its result is there."""

        def counted(tensor: Tensor) -> Tensor:
            with self.waiting():
                return reduce(tensor)

        return counted

    def take_ms(self) -> float:
        """Return the milliseconds waited since the last call, and forget them. Waits for the last mark."""
        waits, self.waits = self.waits, []
        return sum(self._clock.between_ms(*ends) for ends in waits)


class _MeteredChannel:
    def __init__(self, channel: Channel, exposure: Exposure) -> None:
        self._channel, self._exposure = channel, exposure

    def post(self, messages: Sequence[Message]) -> Pending:
        """Start the messages; what waits for them is counted where that is asked for now."""
        pending = self._channel.post(messages)
        return _MeteredPending(pending, self._exposure) if self._exposure.on else pending

    def close(self) -> None:
        self._channel.close()


class _MeteredPending:
    """A posted group whose first wait is counted: later ones, on the same stream, do not wait any more."""

    def __init__(self, pending: Pending, exposure: Exposure) -> None:
        self._pending, self._exposure, self._waited = pending, exposure, False

    @property
    def started(self) -> Any:
        return self._pending.started

    @property
    def ended(self) -> Any:
        return self._pending.ended

    def wait(self) -> None:
        if self._waited:
            self._pending.wait()
            return
        self._waited = True
        with self._exposure.waiting():
            self._pending.wait()
