"""How long attention takes in a training step, forward, backward and choosing apart, whatever computes it."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..model.attached import Attention

PARTS = ("attention_forward", "attention_backward", "choosing")


class Clock:
    """Marks on the device's current stream (host time on CPUs); reading them waits for the device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._spans: dict[str, list[tuple[Any, Any]]] = defaultdict(list)
        self._open: list[Any] = []

    def mark(self) -> Any:
        """Return the present."""
        if self._device.type != "cuda":
            return time.perf_counter_ns()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

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
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        totals = {part: sum(self.between_ms(*ends) for ends in self._spans[part]) for part in PARTS}
        self._spans.clear()
        return totals

    def between_ms(self, started: Any, ended: Any) -> float:
        """Return the milliseconds between two marks. Waits for the second."""
        if self._device.type != "cuda":
            return (ended - started) / 1e6
        ended.synchronize()
        return started.elapsed_time(ended)


class TimedAttention:
    """Attention between marks. Forward includes choosing, which the clock also counts apart."""

    def __init__(self, attention: Attention, clock: Clock) -> None:
        self._attention, self._clock = attention, clock

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Any, *, scale: float | None = None, layer: int | None = None
    ) -> Tensor:
        """Return the attention's out [B, S, H, D]."""
        ends = partial(self._clock.end, "attention_backward")
        q, k, v = _Marked.apply(ends, q, k, v)  # pyright: ignore[reportGeneralTypeIssues]
        with self._clock.span("attention_forward"):
            out = self._attention(q, k, v, mask, scale=scale, layer=layer)
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
