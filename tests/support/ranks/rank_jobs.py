"""Jobs for rank_pool.py that play one layer: called as `function(mesh, **arguments)` on every rank."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from schedule_rewrites import Rewrite
from sparsering.planner.check.check import check
from sparsering.planner.check.playable import check_playable
from sparsering.planner.plan import Plan
from sparsering.planner.schedule.schedule import Direction
from sparsering.runtime.attention import launches, ring
from sparsering.runtime.attention.bound import bind
from sparsering.runtime.attention.buffers import BufferPool
from sparsering.runtime.attention.masks import mask_of
from sparsering.runtime.attention.planned import PlannedAttention
from sparsering.runtime.comm.mesh import Mesh
from sparsering.runtime.pattern.form import AttentionForm
from sparsering.runtime.run.verify import Verdict, verify
from sparsering.traces.pattern import LayerPattern


def _planned(plan: Plan, mesh: Mesh) -> PlannedAttention:
    return PlannedAttention(bind(plan, mesh))


def attention(
    mesh: Mesh,
    *,
    plan: Plan,
    pattern: LayerPattern,
    seed: int,
    batch: int = 1,
    poison: bool = True,
    check_patterns: bool = False,
    layer: int = 0,
    wrap: Callable[[PlannedAttention], None] | None = None,
    softcap: float | None = None,
    sinks: tuple[float, ...] | None = None,
) -> dict[str, Any]:
    """Run one layer forward and backward; return this rank's out, lse, dq, dk, dv as numpy arrays.

    And dsinks, of its own queries, where there are learned sinks, one a head.
    """
    leaf = None if sinks is None else torch.tensor(sinks, dtype=torch.float64, device=mesh.device, requires_grad=True)
    form = AttentionForm(softcap=softcap, sinks=leaf)
    planned = _planned(plan, mesh)
    if wrap is not None:
        wrap(planned)
    tokens, model = planned.bound.placement.padded_tokens, plan.model
    tensors = global_tensors(tokens, (model.heads, model.kv_heads), model.head_dim, seed=seed, batch=batch)
    positions = planned.bound.own_positions.cpu()
    q, k, v, grad_out = (tensor[:, positions].to(mesh.device, planned.bound.dtype) for tensor in tensors)
    for tensor in (q, k, v):
        tensor.requires_grad_()
    mask = mask_of(pattern, columns_capacity=plan.columns_capacity, device=mesh.device)
    if poison:
        _poison(planned, "forward", k)
    out, lse = planned.with_lse(q, k, v, mask, layer=layer, form=form)
    if poison:
        _poison(planned, "backward", k)
    out.backward(grad_out)
    if check_patterns:
        planned.agree_on_patterns()
    results = {"out": out, "lse": lse, "dq": q.grad, "dk": k.grad, "dv": v.grad}
    if leaf is not None:
        results["dsinks"] = leaf.grad
    return {name: as_array(value) for name, value in results.items() if value is not None}


class _Earlier:
    """In the place of ring.Moment, which is a point on a GPU's stream; counts what is posted from it."""

    posts = 0

    @contextmanager
    def posting(self) -> Iterator[None]:
        """Count."""
        _Earlier.posts += 1
        yield


def attention_computing_first(
    mesh: Mesh, *, plan: Plan, pattern: LayerPattern, seed: int, every: int
) -> dict[str, Any]:
    """`attention`, as on GPUs: the first tasks before the first transfers, on ranks that `every` divides.

    Adds "posts", the phases played so; "launches" of block kernels in backward, and "scratches", how many distinct ones
    they were given.
    """
    scratches: list[Any] = []
    backward = launches.api.backward

    def noting(queries: Any, keys: Any, columns: Any, into: Any) -> None:
        if keys is not None:
            scratches.append(queries.scratch)
        backward(queries, keys, columns, into)

    _Earlier.posts = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ring, "Moment", _Earlier)
        patch.setattr(launches.api, "backward", noting)
        for played in (launches.ForwardLaunches, launches.BackwardLaunches):
            patch.setattr(played, "computes_at_once", mesh.rank % every == 0)
        results = attention(mesh, plan=plan, pattern=pattern, seed=seed)
    distinct = {id(scratch) for scratch in scratches if scratch is not None}
    assert not distinct or None not in scratches
    return results | {"posts": _Earlier.posts, "scratches": len(distinct), "launches": len(scratches)}


def attention_rewritten(
    mesh: Mesh, *, plan: Plan, pattern: LayerPattern, seed: int, rewrites: dict[Direction, Rewrite]
) -> dict[str, Any]:
    """`attention` with schedules written anew, and proved."""

    def rewrite(planned: PlannedAttention) -> None:
        programs = planned.bound.programs
        for direction, rewritten in rewrites.items():
            changed = rewritten(programs[direction].schedule)
            check(changed)
            check_playable(changed)
            programs[direction] = replace(programs[direction], schedule=changed, _phases={})
        played = programs.values()
        kv_heads = [one.groups.kv_heads_of_one for one in played]
        planned.pool = BufferPool(mesh.device, [one.schedule for one in played], kv_heads=kv_heads)

    return attention(mesh, plan=plan, pattern=pattern, seed=seed, wrap=rewrite)


def second_gradients(mesh: Mesh, *, plan: Plan, pattern: LayerPattern) -> tuple[str, float]:
    """Ask for a graph of the gradients, then for the gradients alone: the refusal, and how much dq is not as before."""
    planned = _planned(plan, mesh)
    shape, heads = (
        (1, planned.bound.own_positions.numel()),
        (plan.model.heads, plan.model.kv_heads, plan.model.kv_heads),
    )
    q, k, v = (
        torch.randn(*shape, h, plan.model.head_dim, dtype=planned.bound.dtype, requires_grad=True) for h in heads
    )
    mask = mask_of(pattern, columns_capacity=plan.columns_capacity, device=mesh.device)
    out = planned(q, k, v, mask)
    (expected,) = torch.autograd.grad(out.sum(), q, retain_graph=True)
    try:
        torch.autograd.grad(out.sum(), q, create_graph=True)
        refusal = "none"
    except ValueError as error:
        refusal = str(error)
    (again,) = torch.autograd.grad(out.sum(), q)
    return refusal, float((again - expected).abs().max())


def _poison(planned: PlannedAttention, direction: Direction, k: torch.Tensor) -> None:
    """What a schedule forgets to fill shows up as NaN."""
    slots = planned.slots(direction, k)
    for tensor in (tensor for name in slots for tensor in slots[name]):
        tensor.fill_(float("nan"))


def layer_memory_of(mesh: Mesh, *, plan: Plan, pattern: LayerPattern) -> int:
    """Run one layer; return the peak of what torch's allocator holds for it on this rank, inputs included."""
    gc.collect()  # what earlier jobs held must not be freed while this one is watched
    mask = mask_of(pattern, columns_capacity=plan.columns_capacity, device=mesh.device)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        planned = _planned(plan, mesh)
        model, tokens = plan.model, planned.bound.own_positions.numel()
        q, k, v, grad_out = (
            torch.ones(1, tokens, heads, model.head_dim, dtype=planned.bound.dtype)
            for heads in (model.heads, model.kv_heads, model.kv_heads, model.heads)
        )
        for tensor in (q, k, v):
            tensor.requires_grad_()
        planned(q, k, v, mask, layer=0).backward(grad_out)
    assert recorded.profiler is not None and recorded.profiler.kineto_results is not None
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    in_order = sorted(events, key=lambda event: event.start_ns())
    changes = [event.nbytes() for event in in_order]  # pyright: ignore[reportAttributeAccessIssue]  # not in the stubs
    return max(itertools.accumulate(changes))


def verified(mesh: Mesh, *, plan: Plan, pattern: LayerPattern, seed: int) -> list[Verdict]:
    """Run one layer forward and backward in the plan's type and verify it on this rank."""
    planned = _planned(plan, mesh)
    generator = torch.Generator(mesh.device).manual_seed(seed)
    tokens, model = planned.bound.placement.padded_tokens, plan.model
    heads = {"q": model.heads, "k": model.kv_heads, "v": model.kv_heads, "grad_out": model.heads}
    inputs = {
        name: torch.randn(1, tokens, count, model.head_dim, generator=generator, device=mesh.device).to(
            planned.bound.dtype
        )
        for name, count in heads.items()
    }
    own = {name: tensor[:, planned.bound.own_positions] for name, tensor in inputs.items()}
    q, k, v = (own[name].requires_grad_() for name in "qkv")
    mask = mask_of(pattern, columns_capacity=plan.columns_capacity, device=mesh.device)
    out, lse = planned.with_lse(q, k, v, mask)
    out.backward(own["grad_out"])
    results = {"out": out.detach(), "lse": lse, "dq": q.grad, "dk": k.grad, "dv": v.grad}
    return verify(planned.bound, mask, inputs, results, model.head_dim**-0.5)  # pyright: ignore[reportArgumentType]


def global_tensors(
    tokens: int, heads: tuple[int, int], head_dim: int, *, seed: int, batch: int = 1
) -> list[torch.Tensor]:
    """Return q, k, v, grad_out of the whole padded sequence, float64; padding rows are junk that must not matter.

    heads: (query heads, K/V heads).
    """
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(batch, tokens, count, head_dim, generator=generator, dtype=torch.float64)
        for count in (heads[0], heads[1], heads[1], heads[0])
    ]


def as_array(value: torch.Tensor) -> np.ndarray:
    """Return a tensor on the host, float64."""
    return value.detach().double().cpu().numpy()
