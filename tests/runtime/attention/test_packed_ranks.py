"""Packed documents on gloo ranks, in float64: every document has the attention and the gradients that it has alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from rank_jobs import global_tensors
from rank_pool import RankPool
from ring_cases import TOLERANCE, largest_difference
from sparsering.kernels.plain.reference import reference_attention, reference_gradients
from sparsering.kernels.select.anchor import Anchor
from sparsering.kernels.select.probe import ShardTensors
from sparsering.kernels.select.registry import Selector
from sparsering.kernels.select.sink_window import SinkWindow
from sparsering.kernels.select.vertical_slash import FixedVerticalSlash, FlexVerticalSlash
from sparsering.planner.layouts.gather import Gather
from sparsering.planner.layouts.hierarchical import Hierarchical
from sparsering.planner.layouts.layout import Layout
from sparsering.planner.layouts.ring import Ring
from sparsering.planner.plan import Plan, make_plan
from sparsering.planner.schedule.placement import Placement, striped, zigzag
from sparsering.planner.specs import AttentionSpec, KernelSpec, ModelShape
from sparsering.runtime.pattern.selectors import pattern_chosen_by

BLOCK, HEADS, KV_HEADS, DIM = 64, 4, 2, 16
# Of one token, of less than a block, ragged ones that begin with a block; the longest lies on every rank.
LENGTHS = (300, 1, 19, 470, 42, 64, 63, 1, 64)
TOKENS = sum(LENGTHS)
SELECTORS: list[Selector] = [
    FixedVerticalSlash(columns=20, slashes=9, sink_tokens=2, window_tokens=5),
    FlexVerticalSlash(column_mass=0.2, column_cap=30, slash_mass=0.02, slash_cap=30),
    SinkWindow(sink_tokens=3, window_tokens=20),
]


def plan_of(selector: Selector, world_size: int, layout: Layout) -> Plan:
    given: dict[str, Any] = {"seq_len_tokens": TOKENS, "world_size": world_size}
    placement: Placement = striped(**given, granularity_tokens=BLOCK)
    if isinstance(layout, Ring) and world_size > 1:
        placement = zigzag(**given, granularity_tokens=BLOCK)
    firsts = np.cumsum((0, *LENGTHS[:-1]))
    columns = int(selector.most_columns_of(firsts, np.array(LENGTHS), BLOCK).sum())
    return make_plan(
        attention=AttentionSpec(
            model=ModelShape(layers=1, heads=HEADS, kv_heads=KV_HEADS, head_dim=DIM),
            seq_len_tokens=TOKENS, block_size=BLOCK, dtype="float64", columns_capacity=columns + 7,
        ),
        placement=placement, forward=layout, pattern=pattern_chosen_by(selector, packed=True),
        kernels=KernelSpec(backend="blockwise"),
    )  # fmt: skip


def each_alone(selector: Selector, tokens: int) -> dict[str, np.ndarray]:
    """Return out, lse, dq, dk, dv of every document by the reference, under the mask that it has alone."""
    q, k, v, grad_out = global_tensors(tokens, (HEADS, KV_HEADS), DIM, seed=7, batch=1)
    whole: dict[str, list[torch.Tensor]] = {name: [] for name in ("out", "lse", "dq", "dk", "dv")}
    first, kept = 0, 0.0
    for length in LENGTHS:
        own_q, own_k, own_v, own_grad = (x[:, first : first + length].double() for x in (q, k, v, grad_out))
        mask = selector.choose(ShardTensors.whole(own_q, own_k, block_size=BLOCK), scale=DIM**-0.5)
        out, lse = reference_attention(own_q, own_k, own_v, mask, scale=DIM**-0.5)
        gradients = reference_gradients(own_grad, own_q, own_k, own_v, mask, scale=DIM**-0.5)
        for name, value in zip(whole, (out, lse, *gradients), strict=True):
            whole[name].append(value)
        kept += mask.active.sum().item() / mask.active.numel() * length / TOKENS
        first += length
    assert kept < 0.9, "something is left out"
    return {name: torch.cat(parts, dim=2 if name == "lse" else 1).numpy() for name, parts in whole.items()}


@pytest.mark.parametrize("selector", SELECTORS, ids=lambda one: one.name)
@pytest.mark.parametrize(
    ("world_size", "layout"),
    [(1, Ring(prefetch=1)), (2, Gather(chunks=2)), (4, Ring(prefetch=1)), (4, Hierarchical(inner_size=2))],
    ids=["1-ring", "2-gather", "4-ring", "4-hierarchical"],
)
def test_every_document_is_attended_as_alone(
    world_size: int, layout: Layout, selector: Selector, rank_pools: Callable[[int], RankPool]
) -> None:
    plan = plan_of(selector, world_size, layout)
    documents = np.repeat(np.arange(len(LENGTHS)), LENGTHS)
    results = rank_pools(world_size).run("packed_jobs.chosen", plan=plan, documents=documents, seed=7)
    placement = plan.make_placement()
    wanted = each_alone(selector, placement.padded_tokens)
    for rank, result in enumerate(results):
        rows = placement.positions(rank)
        valid = np.flatnonzero(rows < TOKENS)
        for name, whole in wanted.items():
            axis = 2 if name == "lse" else 1
            found, right = np.take(result[name], valid, axis), np.take(whole, rows[valid], axis)
            difference = largest_difference(found, right)
            assert difference <= TOLERANCE, f"rank {rank}, {name}: off by {difference}"


def test_documents_on_all_ranks_attend_the_anchors(rank_pools: Callable[[int], RankPool]) -> None:
    """The first document's gradients are those of keys that everybody attends."""
    selector, documents = Anchor(anchor_tokens=2), np.repeat(np.arange(len(LENGTHS)), LENGTHS)
    plan = plan_of(selector, 4, Ring(prefetch=1))
    results = rank_pools(4).run("packed_jobs.chosen", plan=plan, documents=documents, seed=7)
    placement = plan.make_placement()
    q, k, v, grad_out = (
        x[:, :TOKENS].double() for x in global_tensors(placement.padded_tokens, (HEADS, KV_HEADS), DIM, seed=7, batch=1)
    )
    shard = ShardTensors.whole(q, k, block_size=BLOCK, documents=torch.from_numpy(documents).int())
    mask = selector.choose(shard, scale=1.0)
    out, lse = reference_attention(q, k, v, mask, scale=DIM**-0.5)
    gradients = reference_gradients(grad_out, q, k, v, mask, scale=DIM**-0.5)
    for rank, result in enumerate(results):
        rows = placement.positions(rank)
        valid = np.flatnonzero(rows < TOKENS)
        for name, whole in zip(("out", "lse", "dq", "dk", "dv"), (out, lse, *gradients), strict=True):
            axis = 2 if name == "lse" else 1
            found, right = np.take(result[name], valid, axis), np.take(whole.numpy(), rows[valid], axis)
            assert largest_difference(found, right) <= TOLERANCE, f"rank {rank}, {name}"
