"""What ranks play of a configuration, and how it is judged: a list of problems, empty where all is right."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ....kernels.plain.reference import reference_attention, reference_gradients
from ....planner.plan import Plan
from ....runtime.attention.bound import bind
from ....runtime.attention.masks import mask_of
from ....runtime.attention.planned import PlannedAttention
from ....runtime.comm.mesh import Mesh
from ....runtime.run.verify import verify
from ....runtime.train.config import parse_config
from ....runtime.train.loop import Trainer
from ....runtime.train.setup import set_up
from .draws import Values, attention_case
from .watch import rest

TOLERANCE = 1e-8
# Of a single run's tolerance, twice plain torch's largest error: over thousands of runs the largest of a few rows
# is above it now and then by chance, by a few percent. Where a sequence is so short that plain torch makes no error at
# all, and dq of a single key is zero but for rounding, so many steps of the type at the largest result are allowed.
LENIENCE, STEPS = 2.0, 8


def play(mesh: Mesh, values: Values) -> list[str]:
    """Play a configuration on this rank. Collective."""
    return {"attention": _attention, "training": _training, "rest": _rest}[values["kind"]](mesh, values)


def _attention(mesh: Mesh, values: Values) -> list[str]:
    case = attention_case(values)
    planned = PlannedAttention(bind(case.plan, mesh))
    planned.poisons = values["poison"]
    mask = mask_of(case.pattern, columns_capacity=case.plan.columns_capacity, device=mesh.device)
    problems: list[str] = []
    for turn in range(1 if values["launches"] == "one" else 2):
        inputs = _inputs(case.plan, planned, values, turn)
        own = {name: tensor[:, planned.bound.own_positions].contiguous() for name, tensor in inputs.items()}
        q, k, v = (own[name].requires_grad_() for name in "qkv")
        out, lse = planned.with_lse(q, k, v, mask, layer=0)
        out.backward(own["grad_out"])
        planned.agree_on_patterns()
        results = {"out": out.detach(), "lse": lse.detach(), "dq": q.grad, "dk": k.grad, "dv": v.grad}
        problems += _judged(planned, mask, inputs, results)
    return problems


def _inputs(plan: Plan, planned: PlannedAttention, values: Values, turn: int) -> dict[str, Tensor]:
    """Return q, k, v, grad_out of the whole padded sequence; padding rows are junk that must not matter."""
    generator = torch.Generator().manual_seed(values["seed"] + turn)
    tokens, model = planned.bound.placement.padded_tokens, plan.model
    # What verifies types other than float64 takes one sequence at a time.
    batch = values["batch"] if values["dtype"] == "float64" else 1
    heads = {"q": model.heads, "k": model.kv_heads, "v": model.kv_heads, "grad_out": model.heads}
    return {
        name: torch.randn(batch, tokens, count, model.head_dim, generator=generator).to(planned.bound.dtype)
        for name, count in heads.items()
    }


def _judged(planned: PlannedAttention, mask: Any, inputs: dict[str, Tensor], results: dict[str, Any]) -> list[str]:
    """Compare this rank's results with the dense reference; float64 to 1e-8, other types as `run --verify` does."""
    bound = planned.bound
    scale = inputs["q"].shape[3] ** -0.5
    if bound.dtype != torch.float64:
        verdicts = verify(bound, mask, inputs, results, scale)
        floor = STEPS * torch.finfo(bound.dtype).eps * max(map(_largest, results.values()))
        return [
            f"{one.name}: error {one.error:g} above {LENIENCE:g} times {one.tolerance:g}"
            for one in verdicts
            if not one.error <= max(LENIENCE * one.tolerance, floor)
        ]
    q, k, v, grad_out = inputs.values()
    out, lse = reference_attention(q, k, v, mask, scale=scale)
    dq, dk, dv = reference_gradients(grad_out, q, k, v, mask, scale=scale)
    wanted = {"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv}
    rows = bound.own_positions
    valid = rows < mask.seq_len_tokens
    problems = []
    for name, whole in wanted.items():
        mine = whole[:, :, rows] if name == "lse" else whole[:, rows]
        difference = torch.where(mine == results[name], 0.0, (mine - results[name]).abs()).nan_to_num(nan=torch.inf)
        difference = difference[:, :, valid] if name == "lse" else difference[:, valid]
        worst = float(difference.max()) if difference.numel() else 0.0
        if worst > TOLERANCE:
            problems.append(f"{name}: error {worst:g} above {TOLERANCE:g}")
    return problems


def _largest(value: Tensor) -> float:
    finite = value[value.isfinite()].abs()
    return float(finite.max()) if finite.numel() else 0.0


def _training(mesh: Mesh, values: Values) -> list[str]:
    """Train to the end; train again, stop, resume to the end: losses and parameters must be the same bits."""
    folder = Path(values["folder"])
    whole, _ = _trained(mesh, values, folder, checkpoints=False)
    begun, _ = _trained(mesh, values, folder, checkpoints=True, stop_before=values["stop_before"])
    rest, first = _trained(mesh, values, folder, checkpoints=True)
    problems = []
    if first != values["stop_before"]:
        problems.append(f"resumed at step {first}, stopped before {values['stop_before']}")
    if begun[0] + rest[0] != whole[0]:
        problems.append(f"losses {begun[0] + rest[0]} of the interrupted run, {whole[0]} of the whole one")
    if rest[1] != whole[1]:
        problems.append("parameters of the interrupted run are not those of the whole one")
    return problems


def _trained(
    mesh: Mesh, values: Values, folder: Path, *, checkpoints: bool, stop_before: int | None = None
) -> tuple[tuple[list[float | None], str], int]:
    """Return ((losses, digest of all parameters), first step)."""
    section = {"folder": str(folder / "checkpoints"), "every_steps": 1, "asynchronous": values["asynchronous"]}
    outputs: Values = {"checkpoint": section} if checkpoints else {}
    if values["trace_out"] and checkpoints:
        outputs["trace_out"] = {"folder": str(folder / "trace"), "every_steps": 1}
    if values["metrics"] and checkpoints:
        outputs["metrics"] = {"folder": str(folder / "metrics")}
    config = parse_config(
        {
            "model": {"path": values["model"], "random_weights": True},
            "data": {"folder": values["data_folder"], "documents": values["documents"]},
            "seq_len_tokens": values["seq_len_tokens"], "steps": values["steps"], "dtype": values["dtype"],
            "seed": values["seed"], "device": "cpu", "microbatches": values["microbatches"],
            "parallel": {"data": values["data"], "context": values["context"]},
            "plan": {
                "block_size": values["block_size"], "layout": values["layout"],
                "layout_parameters": values["layout_parameters"],
                "pattern": {"selector": values["selector"], "settings": values["settings"]},
            },
            "optimizer": {"learning_rate": 1e-3, "warmup_steps": 1},
            "memory": {"checkpoint_layers": values["checkpoint_layers"]},
            "verify": {"every_steps": 1, "rows": 32, "poison": values["poison"]}, "timeout_s": 600.0,
        }
        | outputs
    )  # fmt: skip
    trainer = Trainer(set_up(config), mesh)
    try:
        first = trainer.resume()
        results = trainer.run(stop_before=stop_before)
        return ([result.loss for result in results], _digest(trainer)), first
    finally:
        trainer.close()


def _digest(trainer: Trainer) -> str:
    digest = hashlib.sha256()
    for parameter in trainer.hf_model.parameters():
        tensor = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        digest.update(tensor.detach().float().numpy().tobytes())
    return digest.hexdigest()


def _rest(mesh: Mesh, values: Values) -> list[str]:
    """Let go of what nobody holds, and have the allocator give it back: what is left then is held by somebody."""
    rest()
    return []
