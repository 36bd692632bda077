"""Jobs for rank_pool.py over channels that count, are late, or die: `function(mesh, **arguments)`."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from rank_jobs import attention
from sparsering.planner.plan import Plan
from sparsering.runtime.attention.planned import PlannedAttention
from sparsering.runtime.calibrate.host import layer_host_us
from sparsering.runtime.calibrate.raw import Shape
from sparsering.runtime.comm.channels import Channel
from sparsering.runtime.comm.mesh import Mesh
from sparsering.traces.pattern import LayerPattern


class _Hooked:
    """A channel that calls a hook before every post."""

    def __init__(self, channel: Channel, hook: Callable[[], None]) -> None:
        self.channel, self.hook = channel, hook

    def post(self, messages: Any) -> Any:
        self.hook()
        return self.channel.post(messages)

    def close(self) -> None:
        self.channel.close()


def _hook(planned: PlannedAttention, hook: Callable[[], None]) -> None:
    planned.channels = {name: _Hooked(channel, hook) for name, channel in planned.channels.items()}


def attention_and_die(
    mesh: Mesh, *, plan: Plan, pattern: LayerPattern, direction: str, victim: int, check_patterns: bool = False
) -> None:
    """Run one layer; the victim kills itself at its last post of that direction.

    check_patterns: as a training step ends; on GPUs the first time that anybody waits for what the layer posted.
    """
    schedule = plan.schedule("forward"), plan.schedule("backward")
    posts = [sum(len(phase.group_calls) for phase in one.phases(mesh.rank)) for one in schedule]
    deadly = posts[0] if direction == "forward" else sum(posts)
    count = 0

    def die_at_last() -> None:
        nonlocal count
        count += 1
        if mesh.rank == victim and count == deadly:
            os.kill(os.getpid(), signal.SIGKILL)

    attention(
        mesh,
        plan=plan,
        pattern=pattern,
        seed=0,
        check_patterns=check_patterns,
        wrap=lambda planned: _hook(planned, die_at_last),
    )


def exposed_communication(
    mesh: Mesh, *, plan: Plan, pattern: LayerPattern, late_rank: int, late_s: float, on: bool
) -> dict[str, float]:
    """Run one layer in which a rank sleeps before each of its posts; return what this rank waited, by the meter."""
    from sparsering.runtime.timing.spans import Exposure  # brings transformers, which no other job here needs

    exposure, posts = Exposure(mesh.device), 0

    def late() -> None:
        nonlocal posts
        posts += 1
        time.sleep(late_s if mesh.rank == late_rank else 0.0)

    def wrap(planned: PlannedAttention) -> None:
        _hook(planned, late)
        planned.waiting = exposure.waiting
        exposure.on = on

    began = time.perf_counter()
    attention(mesh, plan=plan, pattern=pattern, seed=0, wrap=wrap)
    whole_ms = (time.perf_counter() - began) * 1e3
    waits = len(exposure.waits)
    return {"exposed_ms": exposure.take_ms(), "whole_ms": whole_ms, "posts": posts, "waits": waits,
            "after_ms": exposure.take_ms()}  # fmt: skip


class _Counted:
    """A channel that counts messages and the bytes that are sent."""

    def __init__(self, channel: Channel, sent: Counter[str]) -> None:
        self.channel, self.sent = channel, sent

    def post(self, messages: Any) -> Any:
        outgoing = [message for message in messages if message.operation == "send"]
        self.sent["messages"] += len(outgoing)
        self.sent["bytes"] += sum(message.tensor.nbytes for message in outgoing)
        return self.channel.post(messages)

    def close(self) -> None:
        self.channel.close()


def counted_attention(mesh: Mesh, **arguments: Any) -> tuple[dict[str, Any], Counter[str]]:
    """Do `attention`; return its results and what this rank sent from point to point."""
    sent: Counter[str] = Counter()

    def count(planned: PlannedAttention) -> None:
        planned.channels = {name: _Counted(channel, sent) for name, channel in planned.channels.items()}

    return attention(mesh, wrap=count, **arguments), sent


def delayed_runs(mesh: Mesh, *, plan: Plan, pattern: LayerPattern, runs: int) -> list[str]:
    """Run one layer many times, sleeping at random before posts; return each run's digest of all results."""
    generator = random.Random(mesh.rank)
    digests = []
    for _ in range(runs):
        results = attention(
            mesh,
            plan=plan,
            pattern=pattern,
            seed=0,
            wrap=lambda planned: _hook(planned, lambda: time.sleep(generator.choice((0, 0, 0.002, 0.02)))),
        )
        digests.append(hashlib.sha256(b"".join(value.tobytes() for value in results.values())).hexdigest())
    return digests


def host_of_a_layer(mesh: Mesh) -> tuple[float, float]:
    """What the host takes for a layer, as a calibration measures it on every rank at once."""
    forward, backward = layer_host_us(
        mesh, Shape(backend="blockwise", heads=2, kv_heads=1, head_dim=16, block_size=128)
    )
    return forward, backward
