"""How long attention takes in a training step, forward, backward, choosing and waiting for others apart."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..comm.measure import Marker
from ..model.attached import Attention
from ..pattern.form import PLAIN, AttentionForm

PARTS = ("attention_forward", "attention_backward", "choosing")


class Clock(Marker):
    """Adds up the time between marks by parts; reading it waits for the device."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._spans: dict[str, list[tuple[Any, Any]]] = defaultdict(list)
        self._open: list[Any] = []

    @contextmanager
    def span(self, part: str) -> Iterator[None]:
        """Count what the block enqueues as `part`."""
        started = self.mark()
        yield
        self._spans[part].append((started, self.mark()))

    def begin(self) -> None:
        """Open a span that `end` closes; they nest like brackets."""
        self._open.append(self.mark())

    def end(self, part: str) -> None:
        """Close the span opened last."""
        self._spans[part].append((self._open.pop(), self.mark()))

    def take_ms(self) -> dict[str, float]:
        """Return milliseconds of each part since the last call, and forget them. Waits for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        totals = {part: sum(self.between_ms(*ends) for ends in self._spans[part]) for part in PARTS}
        self._spans.clear()
        return totals


class Exposure:
    """How long attention's compute waits for other ranks in a training step; marks are taken while it is `on`.

    On GPUs two events stand around every point where the compute stream waits for messages: it reaches the first when
    all earlier kernels are done, the second when the messages have landed too. On CPUs it is the time for which the
    computing thread stands still. A late rank shows on those that wait for it. On, nothing is synchronised.
    waits: (before, after) of each wait since the last reading, as a `Marker` marks time.
    """

    def __init__(self, device: torch.device) -> None:
        self.on = False
        self.waits: list[tuple[Any, Any]] = []
        self._marker = Marker(device)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count what the block enqueues (GPUs) or lasts (CPUs): nothing but waiting may stand in it."""
        if not self.on:
            yield
            return
        before = self._marker.mark()
        yield
        self.waits.append((before, self._marker.mark()))

    def take_ms(self) -> float:
        """Return the milliseconds waited since the last call, and forget them. Waits for the last mark."""
        waits, self.waits = self.waits, []
        return sum(self._marker.between_ms(*ends) for ends in waits)


class TimedAttention:
    """Attention between marks. Forward includes choosing, which the clock also counts apart."""

    def __init__(self, attention: Attention, clock: Clock) -> None:
        self._attention, self._clock = attention, clock

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Any, *, scale: float | None = None,
        layer: int | None = None, form: AttentionForm = PLAIN,
    ) -> Tensor:  # fmt: skip
        """Return the attention's out [B, S, H, D]."""
        ends = partial(self._clock.end, "attention_backward")
        q, k, v = _Marked.apply(ends, q, k, v)  # pyright: ignore[reportGeneralTypeIssues]
        with self._clock.span("attention_forward"):
            out = self._attention(q, k, v, mask, scale=scale, layer=layer, form=form)
        (out,) = _Marked.apply(self._clock.begin, out)  # pyright: ignore[reportGeneralTypeIssues]
        return out

    def close(self) -> None:
        """Free what the attention holds."""
        self._attention.close()


class _Marked(torch.autograd.Function):
    """The same tensors; `mark` is called once the gradients of all of them are there."""

    @staticmethod
    def forward(ctx: Any, mark: Callable[[], None], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.mark = mark
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        ctx.mark()
        return None, *grads
