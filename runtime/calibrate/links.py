"""Timing transfers between two GPUs of a host, as runs send them: alone, and what kernels lose beside them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from scipy.optimize import nnls

from ...planner.layouts.gather import Gather
from ...planner.schedule.shape import AttentionShape
from ..comm.channels import Channel, Channels, Message, Pending
from ..comm.mesh import Mesh
from ..comm.pull import PeerMemory

SIZES_BYTES = tuple(1 << power for power in (18, 20, 22, 24, 26, 28))
WARMUPS, REPEATS = 2, 7
MATMUL_SIZE, MATMULS = 8192, 20


@dataclass(frozen=True, kw_only=True)
class LinkTimes:
    """Microseconds by size, of data that both ranks send each other at once; slowdown: share of compute lost beside it.

    post_us: what the host takes to issue one such exchange, and to have the device wait for it.
    """

    transport: str
    bytes_each_way: tuple[int, ...]
    microseconds: tuple[float, ...]
    slowdown: float
    post_us: float

    def line(self) -> tuple[float, float]:
        """Return (latency in microseconds, bytes per microsecond): the line through the points, by relative error."""
        times = np.array(self.microseconds)
        matrix = np.stack([np.ones(len(times)), np.array(self.bytes_each_way, dtype=float)], axis=1) / times[:, None]
        scale = matrix.max(axis=0)
        latency, per_byte = nnls(matrix / scale, np.ones(len(times)))[0] / scale
        return float(latency), 1.0 / float(per_byte)


def measure_links(mesh: Mesh) -> list[LinkTimes]:
    """Time sends by NCCL (gloo on CPUs) and, between GPUs, pulls. Collective, over two ranks."""
    channels, tokens = Channels(mesh), 128
    shape = AttentionShape(world_size=2, tokens_per_rank=tokens, heads=1, kv_heads=1, head_dim=64, element_bytes=2,
                           accumulator_bytes=4, columns_capacity=0)  # fmt: skip
    found = []
    for transport, layout in (("p2p", Gather()), ("pull", Gather(pull=True))):
        if transport == "pull" and mesh.device.type != "cuda":
            continue
        schedule = layout.build(shape=shape, direction="forward")
        (channel,) = channels.bind([schedule]).values()
        exchange = _Exchange(mesh, channel, channels.peers if transport == "pull" else None)
        found.append(_times(mesh, transport, exchange))
    channels.close()
    return found


class _Exchange:
    """Bytes that both ranks send each other, or pull from each other. memory: that both can read, to pull."""

    def __init__(self, mesh: Mesh, channel: Channel, memory: PeerMemory | None) -> None:
        self._channel, self._other, self._first = channel, 1 - mesh.rank, mesh.rank == 0
        self._arena = memory and memory.allocate(max(SIZES_BYTES))
        room = torch.empty(2, max(SIZES_BYTES), dtype=torch.uint8, device=mesh.device).random_()
        self._outgoing, self._incoming = self._arena.memory if self._arena else room[0], room[1]

    def __call__(self, size_bytes: int) -> Pending:
        """Start one exchange of so many bytes each way."""
        outgoing, incoming = self._outgoing[:size_bytes], self._incoming[:size_bytes]
        origin = self._arena.of_peer(outgoing, self._other) if self._arena else None
        pulled = origin is not None
        send = Message(operation="send", tensor=outgoing, peer=self._other, pulled=pulled)
        receive = Message(operation="receive", tensor=incoming, peer=self._other, pulled=pulled, origin=origin)
        return self._channel.post([send, receive] if self._first else [receive, send])


def _times(mesh: Mesh, transport: str, exchange: _Exchange) -> LinkTimes:
    measured = [_slowest(mesh, lambda size=size: exchange(size).wait()) for size in SIZES_BYTES]
    posts = [_host_us(lambda: exchange(SIZES_BYTES[0])) for _ in range(REPEATS)]
    return LinkTimes(
        transport=transport,
        bytes_each_way=SIZES_BYTES,
        microseconds=tuple(measured),
        slowdown=_slowdown(mesh, exchange) if mesh.device.type == "cuda" else 0.0,
        post_us=statistics.median(posts),
    )


def _slowest(mesh: Mesh, work: Callable[[], Any]) -> float:
    """Return the median over repeats of the slower rank's microseconds."""
    repeats = [_elapsed_us(mesh, work) for _ in range(WARMUPS + REPEATS)][WARMUPS:]
    worst = torch.tensor(repeats, dtype=torch.float64, device=mesh.device)
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    return float(worst.median())


def _elapsed_us(mesh: Mesh, work: Callable[[], Any]) -> float:
    dist.barrier()
    if mesh.device.type != "cuda":
        began = time.perf_counter()
        work()
        return 1e6 * (time.perf_counter() - began)
    torch.cuda.synchronize()
    torch.cuda._sleep(1_000_000)
    started, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    started.record()
    work()
    ended.record()
    torch.cuda.synchronize()
    return 1e3 * started.elapsed_time(ended)


def _host_us(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    pending = work()
    if torch.cuda.is_available():  # there a wait is one more thing to issue; on CPUs it lasts as long as the transfer
        pending.wait()
    taken = 1e6 * (time.perf_counter() - began)
    pending.wait()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return taken


def _slowdown(mesh: Mesh, exchange: _Exchange) -> float:
    """Return the share of their speed that matrix products lose while the largest exchanges go on."""
    a = torch.randn(MATMUL_SIZE, MATMUL_SIZE, device=mesh.device, dtype=torch.bfloat16)
    out = torch.empty_like(a)

    def multiply() -> None:
        for _ in range(MATMULS):
            torch.mm(a, a, out=out)

    alone_us = _slowest(mesh, multiply)
    rounds = 1 + int(1.3 * alone_us / max(1.0, _slowest(mesh, lambda: exchange(SIZES_BYTES[-1]).wait())))

    def beside() -> None:
        pending = [exchange(SIZES_BYTES[-1]) for _ in range(rounds)]
        multiply()
        marks.append(torch.cuda.Event(enable_timing=True))
        marks[-1].record()
        pending[-1].wait()

    marks: list[Any] = []
    taken = []
    for _ in range(WARMUPS + 3):
        dist.barrier()
        torch.cuda.synchronize()
        started = torch.cuda.Event(enable_timing=True)
        started.record()
        beside()
        torch.cuda.synchronize()
        taken.append(1e3 * started.elapsed_time(marks[-1]))
    worst = torch.tensor(statistics.median(taken[WARMUPS:]), dtype=torch.float64, device=mesh.device)
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    return max(0.0, 1.0 - alone_us / float(worst))
