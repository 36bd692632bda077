"""Executing a plan on random tensors: verified, repeated, measured. What `sparsering run` does on every rank."""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ...kernels.mask import AttentionMask
from ...planner.plan import Plan
from ...traces.errors import InputError
from ...traces.pattern import LayerPattern
from ...traces.progress import Progress, no_progress
from ...traces.timeline import Span, Timeline
from ..attention.bound import BoundPlan, bind
from ..attention.heads import Pattern
from ..attention.masks import mask_of
from ..attention.patterns import PlannedChoice
from ..attention.planned import PlannedAttention
from ..comm.measure import Recorder, collect_timeline
from ..comm.mesh import Mesh
from .verify import Verdict, verify


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """How often to run and whether to verify. seed: of the random q, k, v and grad_out; layer: which is run."""

    repeats: int = 3
    warmups: int = 1
    verify: bool = False
    seed: int = 0
    layer: int = 0

    def __post_init__(self) -> None:
        if self.repeats < 1 or self.warmups < 0:
            raise InputError(f"{self.repeats} repeats and {self.warmups} warm-ups", field="repeats")


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """What rank 0 knows after a run: the median repeat's timeline, all step times, all ranks' verdicts."""

    timeline: Timeline
    step_times_us: list[float]
    verdicts: list[Verdict]
    peak_bytes: list[int]

    def summary(self) -> dict[str, Any]:
        """Return the figures as plain values."""
        return {
            "step_time_us": statistics.median(self.step_times_us),
            "step_times_us": self.step_times_us,
            "peak_bytes": max(self.peak_bytes, default=0),
            "verified": [asdict(v) | {"tolerance": v.tolerance, "ok": v.ok} for v in self.verdicts],
        }


def execute(
    plan: Plan, mesh: Mesh, pattern: LayerPattern | None, options: RunOptions, progress: Progress = no_progress
) -> RunResult | None:
    """Run one layer forward and backward `repeats` times; the result on rank 0, None elsewhere. Collective.

    pattern: the layer to replay, or None when the plan chooses patterns itself. Raises InputError before any work when
    the plan does not fit.
    """
    if pattern is not None:
        plan.require(seq_len_tokens=pattern.seq_len_tokens)
        plan.require_covered(pattern)
    scale = plan.model.head_dim**-0.5  # random tensors have no model to say another
    recorder = Recorder(device=mesh.device)
    bound = bind(plan, mesh)
    planned = PlannedAttention(bound, recorder=recorder)
    if pattern is not None:
        mask: Pattern = mask_of(pattern, columns_capacity=plan.columns_capacity, device=mesh.device)
    else:
        mask = PlannedChoice(bound).of_layer(options.layer)
    inputs = _inputs(bound, options.seed)
    own = {name: tensor[:, bound.own_positions].contiguous() for name, tensor in inputs.items()}
    if not options.verify:
        inputs.clear()
    spans: list[list[Span]] = []
    peak = 0
    verdicts: list[Verdict] = []
    all_repeats = options.warmups + options.repeats
    for repeat in range(all_repeats):
        progress("repeats", repeat, all_repeats)
        results = _step(planned, own, mask, recorder, options.layer)
        if mesh.device.type == "cuda":
            peak = max(peak, torch.cuda.max_memory_allocated(mesh.device) + planned.pool.uncounted_bytes)
        if repeat >= options.warmups:
            spans.append(recorder.spans(mesh.rank))
        if repeat == 0 and options.verify:
            progress("verifying in float64", 0, 1)
            chosen = mask if isinstance(mask, AttentionMask) else mask(own["q"], own["k"], scale)
            verdicts = verify(bound, chosen, inputs, results, scale)
            progress("verifying in float64", 1, 1)
            inputs.clear()
    progress("repeats", all_repeats, all_repeats)
    planned.agree_on_patterns()
    return _gathered(bound, spans, verdicts, peak)


def _inputs(bound: BoundPlan, seed: int) -> dict[str, Tensor]:
    """Return q, k, v, grad_out of the whole padded sequence, equal on every rank."""
    model, device, tokens = bound.plan.model, bound.mesh.device, bound.placement.padded_tokens
    generator = torch.Generator(device).manual_seed(seed)
    heads = {"q": model.heads, "k": model.kv_heads, "v": model.kv_heads, "grad_out": model.heads}
    drawn = {"generator": generator, "device": device, "dtype": torch.promote_types(bound.dtype, torch.float32)}
    return {
        name: torch.randn(1, tokens, count, model.head_dim, **drawn).to(bound.dtype) for name, count in heads.items()
    }


def _step(
    planned: PlannedAttention, own: dict[str, Tensor], mask: Pattern, recorder: Recorder, layer: int
) -> dict[str, Tensor]:
    q, k, v = (own[name].detach().requires_grad_() for name in "qkv")
    dist.barrier()
    if own["q"].is_cuda:
        torch.cuda.synchronize(own["q"].device)
    recorder.begin()
    out, lse = planned.with_lse(q, k, v, mask, layer=layer)
    out.backward(own["grad_out"])
    assert q.grad is not None and k.grad is not None and v.grad is not None
    return {"out": out.detach(), "lse": lse, "dq": q.grad, "dk": k.grad, "dv": v.grad}


def _gathered(bound: BoundPlan, repeats: list[list[Span]], verdicts: list[Verdict], peak: int) -> RunResult | None:
    mesh = bound.mesh
    device = torch.cuda.get_device_name(mesh.device) if mesh.device.type == "cuda" else "cpu"
    metadata = {"plan_digest": bound.plan.digest, "backend": bound.backend, "device": device}
    timelines = [
        collect_timeline(mesh, spans, topic=f"{bound.topic}/{number}", metadata=metadata)
        for number, spans in enumerate(repeats)
    ]
    everyone = mesh.collect(f"{bound.topic}/verdicts", [[asdict(v) for v in verdicts], peak])
    if mesh.rank or everyone is None:
        return None
    measured = [timeline for timeline in timelines if timeline is not None]
    times = [timeline.makespan_us for timeline in measured]
    middle = sorted(range(len(times)), key=times.__getitem__)[len(times) // 2]
    return RunResult(
        timeline=measured[middle],
        step_times_us=times,
        verdicts=[Verdict(**fields) for rank_verdicts, _ in everyone for fields in rank_verdicts],
        peak_bytes=[rank_peak for _, rank_peak in everyone],
    )
