"""How benchmarks/ring.py measures: steps of one layer on all ranks, with communication or in silence."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ...runtime.comm.channels import Message
from ...runtime.comm.mesh import Mesh


class SilentChannel:
    """Takes messages and sends nothing: what is left is compute. It is itself what it posted: done at once."""

    started: Any = None
    ended: Any = None

    def post(self, messages: Sequence[Message]) -> SilentChannel:
        """Drop the messages."""
        return self

    def wait(self) -> None:
        """Nothing was sent."""

    def close(self) -> None:
        """Nothing to free."""


@dataclass(frozen=True, kw_only=True)
class Figures:
    """Milliseconds of one configuration on the slowest rank, medians over repeats; peak_bytes added on the fullest.

    forward_ms and backward_ms: each from a standstill, where the device waits until the host has issued its first
    kernels; step_ms: both from one standstill. On CPUs nobody counts bytes: None.
    """

    forward_ms: float
    backward_ms: float
    step_ms: float
    peak_bytes: int | None


def allocated_bytes(mesh: Mesh) -> int:
    """Return the bytes that are allocated now, once nothing that is over is held."""
    gc.collect()
    return torch.cuda.memory_allocated() if mesh.device.type == "cuda" else 0


def time_steps(
    attend: Callable[..., Tensor], tensors: list[Tensor], mesh: Mesh, repeats: int, before_bytes: int
) -> Figures:
    """Return the slowest rank's medians after two warm-ups; ranks start together.

    before_bytes: allocated before the layer's inputs and buffers were.
    """
    *inputs, grad_out = tensors
    on_gpu = mesh.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    apart, together = [], []
    for _ in range(repeats + 2):
        _forget_gradients(inputs)
        forward, out = _timed(lambda: attend(*inputs), mesh)
        backward, _ = _timed(lambda out=out: out.backward(grad_out), mesh)
        apart.append((forward, backward))
        del out
    for _ in range(repeats):
        _forget_gradients(inputs)
        together.append(_timed(lambda: attend(*inputs).backward(grad_out), mesh)[0])
    medians = [statistics.median(column) for column in zip(*apart[2:], strict=True)]
    peak = torch.cuda.max_memory_allocated() - before_bytes if on_gpu else 0
    figures = [*medians, statistics.median(together), float(peak)]
    worst = torch.tensor(figures, dtype=torch.float64, device=mesh.device)
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    forward, backward, step, peak = worst.tolist()
    return Figures(forward_ms=forward, backward_ms=backward, step_ms=step, peak_bytes=int(peak) if on_gpu else None)


def _forget_gradients(inputs: Sequence[Tensor]) -> None:
    for tensor in inputs:
        tensor.grad = None


def _timed(work: Callable[[], Any], mesh: Mesh) -> tuple[float, Any]:
    """Return (milliseconds, result)."""
    dist.barrier()
    if mesh.device.type != "cuda":
        began = time.perf_counter()
        result = work()
        return 1e3 * (time.perf_counter() - began), result
    torch.cuda.synchronize()
    started, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    started.record()
    result = work()
    ended.record()
    torch.cuda.synchronize()
    return started.elapsed_time(ended), result
