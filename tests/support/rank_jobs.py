"""Jobs for tests/support/rank_pool.py: what every rank does, called as `function(mesh, **arguments)`."""

from __future__ import annotations

import copy
import gc
import hashlib
import itertools
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AttentionInterface, AutoModelForCausalLM

from model_cases import case_config, case_model, dense_plan
from sparsering.planner.check.check import check
from sparsering.planner.check.playable import check_playable
from sparsering.planner.layouts.draft import COLUMNS
from sparsering.planner.plan import KernelSpec, Plan
from sparsering.planner.schedule.placement import striped
from sparsering.planner.schedule.schedule import Phase, with_programs
from sparsering.runtime.attention import ring, stages
from sparsering.runtime.attention.buffers import BufferPool
from sparsering.runtime.attention.head_stages import HeadBackwardStage, HeadForwardStage
from sparsering.runtime.attention.patterns import mask_of
from sparsering.runtime.attention.planned import PlannedAttention
from sparsering.runtime.comm.channels import Channel, Channels
from sparsering.runtime.comm.mesh import Mesh
from sparsering.runtime.hf.attach import attach
from sparsering.runtime.model.attached import ATTENTION_NAME
from sparsering.runtime.model.shard import shard
from sparsering.runtime.run.verify import Verdict, verify
from sparsering.runtime.timing.exposure import Exposure
from sparsering.traces.pattern import LayerPattern
from tiny_models import tiny_model

_shared: list[Channels] = []


def _planned(plan: Plan, mesh: Mesh) -> PlannedAttention:
    """Bind a plan over the channels of earlier jobs: making process groups is slow."""
    if not _shared:
        _shared.append(Channels(mesh))
    return PlannedAttention(plan, mesh, channels=_shared[0])


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
) -> dict[str, Any]:
    """Run one layer forward and backward; return this rank's out, lse, dq, dk, dv as numpy arrays."""
    planned = _planned(plan, mesh)
    if wrap is not None:
        wrap(planned)
    tokens, model = sum(p.numel() for p in planned.positions), plan.model
    tensors = global_tensors(tokens, (model.heads, model.kv_heads), model.head_dim, seed=seed, batch=batch)
    positions = planned.positions[mesh.rank].cpu()
    q, k, v, grad_out = (tensor[:, positions].to(mesh.device, planned.dtype) for tensor in tensors)
    for tensor in (q, k, v):
        tensor.requires_grad_()
    mask = mask_of(pattern, columns_capacity=plan.columns_capacity, device=mesh.device)
    if poison:
        _poison(planned, "forward", k)
    out, lse = planned.with_lse(q, k, v, mask, layer=layer)
    if poison:
        _poison(planned, "backward", k)
    out.backward(grad_out)
    if check_patterns:
        planned.agree_on_patterns()
    results = {"out": out, "lse": lse, "dq": q.grad, "dk": k.grad, "dv": v.grad}
    return {name: _numpy(value) for name, value in results.items() if value is not None}


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
    block_backward = stages.api.block_backward

    def noting(*given: Any, scratch: Any, **named: Any) -> None:
        scratches.append(scratch)
        block_backward(*given, scratch=scratch, **named)

    _Earlier.posts = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ring, "Moment", _Earlier)
        patch.setattr(stages.api, "block_backward", noting)
        for stage in (stages.ForwardStage, stages.BackwardStage, HeadForwardStage, HeadBackwardStage):
            patch.setattr(stage, "computes_at_once", mesh.rank % every == 0)
        results = attention(mesh, plan=plan, pattern=pattern, seed=seed)
    distinct = {id(scratch) for scratch in scratches if scratch is not None}
    assert not distinct or None not in scratches
    return results | {"posts": _Earlier.posts, "scratches": len(distinct), "launches": len(scratches)}


def attention_summing_columns_last(mesh: Mesh, *, plan: Plan, pattern: LayerPattern, seed: int) -> dict[str, Any]:
    """`attention` with a backward that sums the columns' gradients in phases of their own, after everything else."""

    def rewrite(planned: PlannedAttention) -> None:
        backward = planned.schedules["backward"]
        programs = {rank: _columns_last(backward.phases(rank)) for rank in range(plan.world_size)}
        planned.schedules["backward"] = changed = with_programs(backward, programs)
        check(changed)
        check_playable(changed)
        planned.pool = BufferPool(
            mesh.device, list(planned.schedules.values()), kv_heads=[max(1, plan.model.kv_heads // 2)] * 2
        )

    return attention(mesh, plan=plan, pattern=pattern, seed=seed, wrap=rewrite)


def _columns_last(phases: Sequence[Phase]) -> list[Phase]:
    (call,) = [call for phase in phases for call in phase.group_calls if call.communicator == COLUMNS]
    (name,) = [transfer.id for transfer in call.transfers]
    kept = [
        replace(
            phase,
            waits=tuple(one for one in phase.waits if one != name),
            group_calls=tuple(one for one in phase.group_calls if one.communicator != COLUMNS),
        )
        for phase in phases
    ]
    last = len(kept)
    return [*kept, Phase(index=last, group_calls=(call,)), Phase(index=last + 1, waits=(name,))]


def second_gradients(mesh: Mesh, *, plan: Plan, pattern: LayerPattern) -> tuple[str, float]:
    """Ask for a graph of the gradients, then for the gradients alone: the refusal, and how much dq is not as before."""
    planned = _planned(plan, mesh)
    shape, heads = (1, planned.positions[0].numel()), (plan.model.heads, plan.model.kv_heads, plan.model.kv_heads)
    q, k, v = (torch.randn(*shape, h, plan.model.head_dim, dtype=planned.dtype, requires_grad=True) for h in heads)
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


def _poison(planned: PlannedAttention, direction: str, k: torch.Tensor) -> None:
    """What a schedule forgets to fill shows up as NaN."""
    slots = planned.slots(direction, k)
    for part in (part for name in slots for part in slots[name]):
        part.fill_(float("nan"))


def layer_memory_of(mesh: Mesh, *, plan: Plan, pattern: LayerPattern) -> int:
    """Run one layer; return the peak of what torch's allocator holds for it on this rank, inputs included."""
    gc.collect()  # what earlier jobs held must not be freed while this one is watched
    mask = mask_of(pattern, columns_capacity=plan.columns_capacity, device=mesh.device)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        planned = _planned(plan, mesh)
        model, tokens = plan.model, planned.positions[0].numel()
        q, k, v, grad_out = (
            torch.ones(1, tokens, heads, model.head_dim, dtype=planned.dtype)
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
    exposure, posts = Exposure(mesh.device), 0

    def late() -> None:
        nonlocal posts
        posts += 1
        time.sleep(late_s if mesh.rank == late_rank else 0.0)

    def wrap(planned: PlannedAttention) -> None:
        _hook(planned, late)
        planned.channels = exposure.channels(planned.channels)
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


def verified(mesh: Mesh, *, plan: Plan, pattern: LayerPattern, seed: int) -> list[Verdict]:
    """Run one layer forward and backward in the plan's type and verify it on this rank."""
    planned = _planned(plan, mesh)
    generator = torch.Generator(mesh.device).manual_seed(seed)
    tokens, model = sum(p.numel() for p in planned.positions), plan.model
    heads = {"q": model.heads, "k": model.kv_heads, "v": model.kv_heads, "grad_out": model.heads}
    inputs = {
        name: torch.randn(1, tokens, count, model.head_dim, generator=generator, device=mesh.device).to(planned.dtype)
        for name, count in heads.items()
    }
    own = {name: tensor[:, planned.positions[mesh.rank]] for name, tensor in inputs.items()}
    q, k, v = (own[name].requires_grad_() for name in "qkv")
    mask = mask_of(pattern, columns_capacity=plan.columns_capacity, device=mesh.device)
    out, lse = planned.with_lse(q, k, v, mask)
    out.backward(own["grad_out"])
    results = {"out": out.detach(), "lse": lse, "dq": q.grad, "dk": k.grad, "dv": v.grad}
    return verify(planned, mask, inputs, results, model.head_dim**-0.5)  # pyright: ignore[reportArgumentType]


def model_step(
    mesh: Mesh, *, plan: Plan, family: str, ids: np.ndarray, attention_mask: np.ndarray | None = None
) -> dict[str, Any]:
    """Forward and backward of a tiny attached model on this rank's shard; the loss is summed, not averaged."""
    model = tiny_model(family, dtype=torch.float64)
    attached = attach(model, plan, mesh)
    part = shard({"input_ids": torch.from_numpy(ids)}, plan, mesh.rank)
    mask = (
        None
        if attention_mask is None
        else torch.from_numpy(attention_mask)[:, part["position_ids"][0].clamp(max=ids.shape[1] - 1)]
    )
    logits = model(input_ids=part["input_ids"], position_ids=part["position_ids"], attention_mask=mask).logits
    loss = torch.nn.functional.cross_entropy(logits[0], part["labels"][0], reduction="sum")
    loss.backward()
    attached.detach()
    gradients = {name: _numpy(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    return {"loss_sum": loss.item(), "gradients": gradients}


def attach_case(mesh: Mesh, *, name: str) -> None:
    """Attach a case of tests/support/model_cases.py to a dense plan over all ranks, and detach it."""
    model = case_model(name)
    attach(model, dense_plan(model.config, world_size=mesh.world_size), mesh).detach()


def case_step(mesh: Mesh, *, name: str, ids: np.ndarray, labels: np.ndarray, head_gain: float) -> dict[str, Any]:
    """Forward and backward of an attached case through its own forward and loss, with all that `shard` returns."""
    model = case_model(name, head_gain=head_gain).train()
    plan = dense_plan(model.config, world_size=mesh.world_size)
    attached = attach(model, plan, mesh)
    batch = {"input_ids": torch.from_numpy(ids), "labels": torch.from_numpy(labels)}
    output = model(**shard(batch, plan, mesh.rank))
    output.loss.backward()
    attached.detach()
    gradients = {name: _numpy(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    positions = plan.make_placement().positions(mesh.rank)
    return {"loss": output.loss.item(), "logits": _numpy(output.logits), "positions": positions, "gradients": gradients}


def padded_beyond_positions(mesh: Mesh) -> str:
    """Attach a model with as many learned positions as tokens to a plan that pads them."""
    config = case_config("gpt2")
    config.n_positions = 250
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float64, attn_implementation="eager")
    placement = striped(seq_len_tokens=250, world_size=mesh.world_size, granularity_tokens=64)
    plan = dense_plan(config, world_size=mesh.world_size, seq_len_tokens=250, placement=placement)
    return _told(lambda: attach(model, plan, mesh))


def first_losses(mesh: Mesh) -> dict[str, str]:
    """Attach anew for each way in which ranks may be wrong together; return what the first call with labels says."""
    ids = torch.arange(256)[None] % 250
    labels = ids.masked_fill(torch.arange(256)[None] > 100, -100)
    told = {}
    for name in ("right", "own count", "not shifted", "other weights"):
        model = case_model("llama", seed=mesh.rank if name == "other weights" else 0)
        plan = dense_plan(model.config, world_size=mesh.world_size)
        attached = attach(model, plan, mesh)
        part = shard({"input_ids": ids, "labels": labels}, plan, mesh.rank)
        if name == "own count":
            part["num_items_in_batch"] = (part["labels"] != -100).sum().clamp(min=1)
        if name == "not shifted":
            part["shift_labels"] = part["labels"] = part["input_ids"]
        told[name] = _told(lambda model=model, part=part: model(**part))
        attached.detach()
    return told


def autocast_step(mesh: Mesh) -> dict[str, Any]:
    """Forward and backward of float32 weights under autocast, as Trainers do with bf16=True, by a bfloat16 plan."""
    model = case_model("llama", dtype=torch.float32).train()
    plan = dense_plan(model.config, world_size=mesh.world_size, dtype="bfloat16")
    attached = attach(model, plan, mesh)
    ids = torch.randint(3, 250, (1, 256), generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**shard({"input_ids": ids}, plan, mesh.rank)).loss
    loss.backward()
    attached.detach()
    types = sorted({str(p.grad.dtype) for p in model.parameters() if p.grad is not None})
    return {"loss": loss.item(), "types": types, "ids": ids.numpy()}


def guarded_calls(mesh: Mesh) -> dict[str, str]:
    """Call an attached model wrongly in every way; return what each call says, "" for none."""
    model = case_model("llama")
    plan = dense_plan(model.config, world_size=mesh.world_size)
    ids = torch.arange(256)[None] % 250
    own, other = (shard({"input_ids": ids}, plan, rank) for rank in (mesh.rank, 1 - mesh.rank))
    attached = attach(model, plan, mesh)

    def without(*names: str) -> dict[str, torch.Tensor]:
        return {name: value for name, value in own.items() if name not in names}

    calls: dict[str, Callable[[], Any]] = {
        "no positions": lambda: model(**without("position_ids")),
        "other rank": lambda: model(**other),
        "other length": lambda: model(**{name: value[:, :64] if value.dim() else value for name, value in own.items()}),
        "no shifted labels": lambda: model(**without("shift_labels")),
        "no count": lambda: model(**without("num_items_in_batch")),
        "two sequences": lambda: model(**{n: v.expand(2, -1) if v.dim() else v for n, v in own.items()}),
        "router losses": lambda: model(**own, output_router_logits=True),
        "labels by place": lambda: model(own["input_ids"], None, own["position_ids"], None, None, own["labels"]),
        "attached twice": lambda: attach(model, plan, mesh),
        "body alone": lambda: model.model(input_ids=own["input_ids"]),
        "right": lambda: model(**own),
        "right, without a loss": lambda: model(**without("labels", "shift_labels", "num_items_in_batch")),
    }
    told = {name: _told(call) for name, call in calls.items()}
    copied = copy.deepcopy(model)
    told["copy"] = _told(lambda: copied(**own))
    same = copied(**own).loss.item() == model(**own).loss.item()
    compiled = torch.compile(model, backend="eager")
    told["compiled"] = "" if abs(compiled(**own).loss.item() - model(**own).loss.item()) < 1e-12 and same else "differs"
    model.set_attn_implementation("sdpa")
    told["another attention"] = _told(lambda: model(**own))
    model.set_attn_implementation(ATTENTION_NAME)
    attached.detach()
    told["detached copy"] = _told(lambda: copied(**own))
    told["detached"] = _told(lambda: model(input_ids=ids, labels=ids))
    attach(model, plan, mesh).detach()  # again
    return told


def _gpu_case(name: str, mesh: Mesh, dtype: torch.dtype) -> Any:
    """Return the same weights in any type; converting the model would round its rotation angles too."""
    model: Any = case_model(name, dtype=dtype)
    model.load_state_dict(case_model(name, dtype=torch.float32, head_gain=5.0).state_dict())
    return model.to(mesh.device).train()


def attached_on_gpus(mesh: Mesh, *, name: str) -> dict[str, float]:
    """Return errors of loss and gradients against float64: of a bfloat16 model over all GPUs, and of it alone."""
    ids = torch.randint(3, 250, (1, 512), generator=torch.Generator().manual_seed(0)).to(mesh.device)
    results: dict[str, tuple[float, torch.Tensor]] = {}
    for kind, dtype in (("exact", torch.float64), ("alone", torch.bfloat16)):
        model = _gpu_case(name, mesh, dtype)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        results[kind] = loss.item(), torch.cat([p.grad.double().flatten() for p in model.parameters()])
    model = _gpu_case(name, mesh, torch.bfloat16)
    plan = dense_plan(
        model.config, world_size=mesh.world_size, seq_len_tokens=512, dtype="bfloat16", block_size=128,
        placement=striped(seq_len_tokens=512, world_size=mesh.world_size, granularity_tokens=128),
        settings={"sink_tokens": 0, "window_tokens": 512}, kernels=KernelSpec(backend="triton"),
    )  # fmt: skip
    attached = attach(model, plan, mesh)
    loss = model(**shard({"input_ids": ids}, plan, mesh.rank)).loss
    loss.backward()
    attached.detach()
    gradient = torch.cat([p.grad.double().flatten() for p in model.parameters()])
    torch.distributed.all_reduce(gradient)
    total = loss.detach().double()
    torch.distributed.all_reduce(total)
    exact_loss, exact = results["exact"]
    alone_loss, alone = results["alone"]
    return {
        "loss": abs(total.item() - exact_loss),
        "loss_alone": abs(alone_loss - exact_loss),
        "gradient": float((gradient - exact).norm() / exact.norm()),
        "gradient_alone": float((alone - exact).norm() / exact.norm()),
    }


def wrong_positions_on_gpus(mesh: Mesh) -> dict[str, str]:
    """Call an attached model with its own shard, with the other rank's, and with its own again."""
    made: Any = case_model("llama", dtype=torch.bfloat16)
    model = made.to(mesh.device)
    plan = dense_plan(model.config, world_size=mesh.world_size, dtype="bfloat16", kernels=KernelSpec(backend="triton"))
    batch = {"input_ids": torch.arange(256, device=mesh.device)[None] % 250}
    own, other = (shard(batch, plan, rank) for rank in (mesh.rank, 1 - mesh.rank))
    attached = attach(model, plan, mesh)
    calls = {"right": own, "wrong": other, "right again": own}
    told = {name: _told(lambda part=part: model(**part).loss.backward()) for name, part in calls.items()}
    attached.detach()
    return told


def _told(call: Callable[[], Any]) -> str:
    try:
        call()
    except ValueError as error:
        return str(error)
    return ""


def chosen_columns(mesh: Mesh, *, name: str, ids: np.ndarray, settings: dict[str, Any]) -> list[list[list[int]]]:
    """Run an attached case whose patterns are chosen; return the columns of every layer and head."""
    model = case_model(name)
    plan = dense_plan(
        model.config, world_size=mesh.world_size, selector="flex", settings=settings, columns_capacity=256
    )
    attached = attach(model, plan, mesh)
    assert isinstance(attached.planned, PlannedAttention)
    seen: list[list[list[int]]] = []
    note = attached.planned.note_pattern

    def noting(mask: Any) -> None:
        seen.append([sorted(x for x in head.tolist() if x < 256) for head in mask.columns])
        note(mask)

    attached.planned.note_pattern = noting
    with torch.no_grad():
        part = shard({"input_ids": torch.from_numpy(ids)}, plan, mesh.rank)
        model(input_ids=part["input_ids"], position_ids=part["position_ids"])
    attached.detach()
    return seen


def attention_call(mesh: Mesh, *, plan: Plan, keywords: dict[str, Any]) -> None:
    """Call the attached attention of a tiny model's first layer directly, as a model with such keywords would."""
    model = tiny_model("llama", dtype=torch.float64)
    attached = attach(model, plan, mesh)
    module = next(m for m in model.modules() if getattr(m, "layer_idx", None) == 0 and hasattr(m, "is_causal"))
    query, key = torch.zeros(1, 4, 256, 16, dtype=torch.float64), torch.zeros(1, 2, 256, 16, dtype=torch.float64)
    given = {name: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for name, v in keywords.items()}
    arguments = {"attention_mask": None, "scaling": 0.25} | given
    try:
        AttentionInterface()[ATTENTION_NAME](module, query, key, key, **arguments)
    finally:
        attached.detach()


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


def _numpy(value: torch.Tensor) -> np.ndarray:
    return value.detach().double().cpu().numpy()
