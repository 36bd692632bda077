"""Backward's sums of dK/dV in slots: what landed and what is computed here add up, in whatever order it came.

One rank alone: what others send is written into the slots by hand. That whole schedules add up is in `test_ring_gloo`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from schedule_cases import FIRST
from sparsering.kernels.api import accumulator_dtype, backend_of
from sparsering.kernels.plain.reference import reference_attention
from sparsering.planner.schedule.schedule import DKV_HOME, KV_HOME, Buffer, Phase, Schedule, ShardId, Task, Transfer
from sparsering.runtime.attention.buffers import BufferPool, Slots
from sparsering.runtime.attention.heads import HeadGroups
from sparsering.runtime.attention.launches import BackwardLaunches
from sparsering.runtime.attention.layer import Layer
from sparsering.runtime.attention.masks import Indexes, mask_of
from sparsering.runtime.attention.program import Program
from sparsering.runtime.attention.sums import KeySums
from sparsering.traces.pattern import dense

TOKENS, HEADS, HEAD_DIM = 64, 2, 16
OWN = ShardId(sequence_part=0)
TASK = Task(query=OWN, key=OWN, heads=(0, HEADS), key_buffer=KV_HOME, grad_buffer="dkv:0")
LANDS = replace(FIRST, destination=0)
GOES_ON = replace(LANDS, source=0, destination=2)


@dataclass(frozen=True, kw_only=True)
class Backward:
    """A rank whose only shard attends itself; its slots hold NaN."""

    slots: Slots
    sums: KeySums
    layer: Layer
    launches: BackwardLaunches


def backward(dtype: torch.dtype = torch.float64, tasks: tuple[Task, ...] = (TASK, TASK)) -> Backward:
    """tasks: what the rank computes, of which a test may play the first ones alone."""
    nan, summed = float("nan"), accumulator_dtype(dtype)
    generator = torch.Generator().manual_seed(0)
    q, k, v, grad_out = (torch.randn(1, TOKENS, HEADS, HEAD_DIM, generator=generator).to(dtype) for _ in range(4))
    pattern = dense(seq_len_tokens=TOKENS, block_size=64, heads=HEADS)
    mask = mask_of(pattern, columns_capacity=0, device=torch.device("cpu"))
    indexes = Indexes(
        source=mask,
        positions=[torch.arange(TOKENS)],
        rank=0,
        backend="reference",
        columns_capacity=0,
        joined_positions={},
        chosen=lambda _: None,
    )
    schedule = Schedule(
        direction="backward",
        layout="hand-made",
        world_size=1,
        num_heads=HEADS,
        communicators=(),
        buffers=tuple(Buffer(name=f"dkv:{number}", kind="dkv", capacity_bytes=8) for number in range(3)),
        program=lambda rank: (Phase(index=0, tasks=tasks),),
    )
    groups = HeadGroups(count=1, heads=HEADS, kv_heads=HEADS)
    program = Program(schedule=schedule, rank=0, groups=groups, backend="reference")
    slots = BufferPool(q.device, [schedule]).slots(schedule, k.shape, {"dkv": summed})
    for part in (part for name in slots for part in slots[name]):
        part.fill_(nan)
    home = torch.full_like(k, nan, dtype=summed), torch.full_like(v, nan, dtype=summed)
    sums = KeySums(slots=slots, groups=groups, home=home, backend=backend_of("reference"), dtype=dtype)
    out, lse = reference_attention(q, k, v, mask, scale=0.25)
    delta = (grad_out.double() * out).sum(-1).transpose(1, 2).to(summed)
    queries = q, grad_out, lse.to(summed), delta
    layer = Layer(program=program, indexes=indexes, slots=slots, kv=(k, v), queries=queries, sums=sums)
    launches = BackwardLaunches(layer=layer, scale=0.25)
    return Backward(slots=slots, sums=sums, layer=layer, launches=launches)


def land(played: Backward, transfer: Transfer, value: float) -> None:
    for part in played.layer.incoming(transfer):
        part.fill_(value)


def computed() -> tuple[Tensor, Tensor]:
    """What TASK adds."""
    played = backward()
    played.launches.compute((TASK,))
    return played.slots["dkv:0"]


def test_a_task_adds_to_a_sum_that_landed_in_its_slot() -> None:
    played = backward()
    land(played, LANDS, 3.0)
    played.layer.received([LANDS])
    played.launches.compute((TASK,))
    for part, alone in zip(played.slots["dkv:0"], computed(), strict=True):
        torch.testing.assert_close(part, alone + 3.0)


@pytest.mark.parametrize("landed", [0.0, 3.0])
def test_tasks_of_some_heads_add_up_to_one_of_all(landed: float) -> None:
    tasks = tuple(replace(TASK, heads=(head, head + 1)) for head in range(HEADS))
    played = backward(tasks=tasks)
    if landed:
        land(played, LANDS, landed)
        played.layer.received([LANDS])
    for task in tasks:
        played.launches.compute((task,))
    for part, alone in zip(played.slots["dkv:0"], computed(), strict=True):
        torch.testing.assert_close(part, alone + landed)


@pytest.mark.parametrize("sent_first", [True, False])
def test_a_sum_that_landed_and_went_on_is_not_added_to(sent_first: bool) -> None:
    """It may be waited for after what sent it on: both are in one communicator's queue."""
    played = backward()
    land(played, LANDS, 3.0)
    for step in [played.layer.sent, lambda _: played.layer.received([LANDS])][:: 1 if sent_first else -1]:
        step(GOES_ON)
    played.launches.compute((TASK,))
    for part, alone in zip(played.slots["dkv:0"], computed(), strict=True):
        torch.testing.assert_close(part, alone)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_sums_are_added_in_the_order_of_the_waits_rounded_or_not(dtype: torch.dtype) -> None:
    """What lands in dkv:0 goes home; then dkv:0 takes what lands, rounded, in dkv:1."""
    played = backward(dtype)
    home = replace(LANDS, accumulate_into=DKV_HOME)
    narrow = replace(LANDS, sequence=1, buffer="dkv:1", accumulate_into="dkv:0", narrow=True)
    land(played, home, 3.0)
    land(played, narrow, 5.0)
    played.layer.received([home, narrow])
    assert {float(part.mean()) for part in played.slots["dkv:0"]} == {5.0}
    assert {float(part.mean()) for part in played.sums.finish()} == {3.0}
