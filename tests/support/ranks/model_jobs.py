"""Jobs for rank_pool.py that attach a model: called as `function(mesh, **arguments)` on every rank."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from transformers import AttentionInterface, AutoModelForCausalLM

from model_cases import case_config, case_model, dense_plan
from rank_jobs import as_array
from sparsering.planner.plan import KernelSpec, Plan
from sparsering.planner.schedule.placement import striped
from sparsering.runtime.attention.planned import PlannedAttention
from sparsering.runtime.comm.mesh import Mesh
from sparsering.runtime.hf.attach import attach
from sparsering.runtime.model.attached import ATTENTION_NAME
from sparsering.runtime.model.shard import shard
from tiny_models import tiny_model


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
    gradients = {name: as_array(p.grad) for name, p in model.named_parameters() if p.grad is not None}
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
    gradients = {name: as_array(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    positions = plan.make_placement().positions(mesh.rank)
    return {
        "loss": output.loss.item(),
        "logits": as_array(output.logits),
        "positions": positions,
        "gradients": gradients,
    }


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
