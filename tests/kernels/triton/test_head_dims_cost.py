"""Padded heads are priced, in time and memory, as what is computed."""

from __future__ import annotations

import gc
import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import kernel_calls as calls
import tiny
from padded_cases import (
    SCALE,
    plan_of,
)
from sparsering.kernels import api
from sparsering.kernels.mask import AttentionMask
from sparsering.planner.cost.kernels import DatasheetCost, datasheet_cost
from sparsering.planner.cost.memory import layer_memory
from sparsering.planner.plan import ModelShape
from sparsering.planner.schedule.launches import Launch
from sparsering.planner.schedule.schedule import DIRECTIONS, KV_HOME, Direction, ShardId, Task
from sparsering.planner.schedule.shape import AttentionShape
from sparsering.planner.schedule.workload import TaskWork

pytest.importorskip("triton")
from sparsering.kernels.triton import gradients

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without a GPU")


OWN = ShardId(sequence_part=0)
KEYS = Task(query=OWN, key=OWN, heads=(0, 4), key_buffer=KV_HOME)
COLUMNS = Task(query=OWN, key=None, heads=(0, 4), key_buffer="columns:home", kind="columns")
WORK = TaskWork(tile_pairs=900, rows_with_work=90, longest_row=10, key_rows_with_work=80, longest_key_row=12, rows=100)


def price(head_dim: int, backend: str, direction: Direction, *tasks: Task, bandwidth: float | None = None) -> float:
    gpu = tiny.cluster().gpu.model_copy(update={"memory_bandwidth_bytes_per_us": bandwidth})
    model = ModelShape(layers=1, heads=4, kv_heads=2, head_dim=head_dim)
    cost = datasheet_cost(gpu, model, block_size=128, backend=backend)
    return cost.launch_us(Launch(tasks=tasks), [WORK] * len(tasks), direction)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("tasks", [(KEYS,), (COLUMNS,), (COLUMNS, KEYS)], ids=["keys", "columns", "both"])
def test_padded_heads_are_computed_at_the_price_of_what_they_are_padded_to(
    direction: Direction, tasks: tuple[Task, ...]
) -> None:
    for backend in ("triton", "fastest"):
        assert price(96, backend, direction, *tasks) == price(80, backend, direction, *tasks)
        assert price(96, backend, direction, *tasks) == price(128, backend, direction, *tasks)
        # Accumulators as large, and copies besides.
        assert price(96, backend, direction, *tasks, bandwidth=1e4) > price(
            128, backend, direction, *tasks, bandwidth=1e4
        )
    assert price(96, "blockwise", direction, *tasks) < price(128, "blockwise", direction, *tasks)


def test_copies_of_padded_heads_by_hand() -> None:
    """bfloat16, alone on its queries, K/V heads shared by two: every copy reads one size and writes the other."""
    rows = 100 * 128

    def moved_bytes(head_dim: int, direction: Direction) -> float:
        given = (head_dim, "triton", direction, KEYS)
        return price(*given, bandwidth=1.0) - price(*given)

    forward = 2 + 2 * 2 / 2 + 2  # q; k and v; out
    backward = 2 * 2 + 2 * 2 / 2 + 2 + 2 * 4 / 2  # q and dout; k and v; dq; dk and dv in float32
    for direction, copied in zip(DIRECTIONS, (forward, backward), strict=True):
        more = moved_bytes(96, direction) - moved_bytes(128, direction)
        assert more == pytest.approx(rows * (96 + 128) * copied)


def test_what_is_not_padded_costs_what_it_did() -> None:
    gpu, model = tiny.cluster().gpu, ModelShape(layers=1, heads=4, kv_heads=2, head_dim=64)
    made = datasheet_cost(gpu, model, block_size=128)
    assert replace(made, computed_head_dim=None) == DatasheetCost(
        gpu=gpu, head_dim=64, block_size=128, queries_per_kv_head=2, heads=4
    )
    assert price(64, "triton", "backward", KEYS, bandwidth=1.0) == replace(
        made, gpu=gpu.model_copy(update={"memory_bandwidth_bytes_per_us": 1.0}), computed_head_dim=None
    ).launch_us(Launch(tasks=(KEYS,)), [WORK], "backward")


def launch_peak_bytes(shape: AttentionShape, monkeypatch: pytest.MonkeyPatch) -> int:
    """Return what torch's allocator gives one backward launch, of the own keys and the columns, beyond its inputs."""
    tokens, heads = shape.tokens_per_rank, (shape.heads, shape.heads, shape.kv_heads, shape.kv_heads)
    run = gradients.run

    def run_and_forget(*given: Any, **named: Any) -> None:
        run(*given, **named)
        gc.collect()  # the interpreter holds arguments in a cycle

    monkeypatch.setattr(gradients, "run", run_and_forget)
    mask = AttentionMask(
        seq_len_tokens=tokens, block_size=64, active=torch.ones(shape.heads, tokens // 64, dtype=torch.bool),
        columns=torch.arange(shape.columns_capacity, dtype=torch.int32).repeat(shape.heads, 1),
    )  # fmt: skip
    at = torch.arange(tokens)
    common: dict[str, Any] = {"backend": "triton"}
    grad_out, q, k, v = (torch.zeros(1, tokens, n, shape.head_dim, dtype=torch.float16) for n in heads)
    index, of_columns = api.block_index(mask, at, at, **common), api.column_index(mask, at, **common)
    gathered = api.gather_columns(k, v, of_columns)
    grads = {
        name: torch.empty_like(x, dtype=torch.float32) for name, x in (("grad_q", q), ("grad_k", k), ("grad_v", v))
    }
    of_gathered = torch.zeros_like(gathered, dtype=torch.float32)
    rows = torch.zeros(2, 1, shape.heads, tokens)
    given: dict[str, Any] = {"columns": (gathered[0], gathered[1], of_columns), "grad_columns": tuple(of_gathered)}
    given |= {"final_q": torch.empty_like(q), "add_q": False, "add_kv": False, "scale": SCALE}
    assert of_columns.data.bits[0].numel() and of_columns.data.first_tile.numel()  # made at the first use, and kept
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        calls.block_backward(grad_out, q, k, v, rows[0], rows[1], index, **grads, **given)
        gc.collect()
    assert recorded.profiler is not None and recorded.profiler.kineto_results is not None
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    in_order = sorted(events, key=lambda event: event.start_ns())
    changes = [event.nbytes() for event in in_order]  # pyright: ignore[reportAttributeAccessIssue]  # not in the stubs
    return max(itertools.accumulate(changes))


@interpreted
@pytest.mark.parametrize("head_dim", [96, 80])
def test_a_launch_of_padded_heads_needs_what_the_plan_says(head_dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a plan counts beyond gradients as they are returned, and dq, which the last launch writes as one of them."""
    plan = plan_of(head_dim, "triton", world_size=1)
    shape, schedule = plan.attention_shape(), plan.schedule("backward")
    predicted = layer_memory(schedule, shape, backend="triton").workspace_bytes + shape.kv_bytes
    assert launch_peak_bytes(shape, monkeypatch) == pytest.approx(predicted, rel=0.05)


def test_copies_of_padded_heads_are_counted_and_nothing_that_travels() -> None:
    """Two shards, of which each launch reads one; by hand."""
    plan = plan_of(96, "fastest", columns=0)
    shape, schedules = plan.attention_shape(), [plan.schedule(direction) for direction in DIRECTIONS]
    for schedule in schedules:
        padded, plain = (layer_memory(schedule, shape, backend=name) for name in ("fastest", "blockwise"))
        assert layer_memory(schedule, shape, backend="triton") == padded
        assert replace(padded, workspace_bytes=plain.workspace_bytes) == plain
        # q and dout copied, dq in float32; k and v copied, dk and dv in float32; and dq as it is returned.
        rows = 128 * (4 * (2 + 2 + 4) + 2 * 2 * (2 + 4)) + 4 * 96 * 2
        returned = 96 * 2 * (4 + 2 * 2)
        wanted = 256 * (rows - returned) if schedule.direction == "backward" else 0
        assert padded.workspace_bytes - plain.workspace_bytes == wanted
    as_it_is = plan_of(64, "triton")
    assert (
        layer_memory(as_it_is.schedule("backward"), as_it_is.attention_shape(), backend="triton").workspace_bytes == 0
    )
