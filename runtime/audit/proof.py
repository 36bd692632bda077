"""The audit's numbers: a small copy of a model run alone and split in two must agree in loss, logits and gradients.

Dense attention, float64, on the CPU, in training mode. Alone, the model computes its own eager attention; split, two
copies see a shard each and meet in attention only (`twins.py`), once through the model's own forward and loss, as
`attach` runs them, and once through the fused head and loss of `sparsering train`.

Shape legend: B batch, S tokens, V vocabulary.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ...planner.layouts.gather import Gather
from ...planner.layouts.ring import Ring
from ...planner.plan import AttentionSpec, KernelSpec, ModelShape, Plan, make_plan
from ...planner.schedule.placement import striped
from ...traces.errors import UnsupportedError
from ..model.attached import Attached
from ..model.calls.own_loss import computes_own_loss, token_loss
from ..model.head_loss import ModelWithLoss
from ..model.router_loss import router_loss_of
from ..model.shape import model_body
from ..model.shard import IGNORED_LABEL, shard
from ..pattern.selectors import dense_pattern
from .single_tokens import check_calls, random_ids
from .small import AUDITED_TOKENS
from .twins import AttentionCall, Double, Meeting, MetAttention, run_together

TOLERANCE = 1e-6
STRIPE_TOKENS, RANKS = 16, 2
NOISE_FLOOR = 1e-8  # gradients this much smaller than the largest are zero but for rounding (a key's bias, say)
GAP_SHARE = 0.4  # labels that do not count, so that ranks have unequal numbers of them

Step = Callable[[Attached, dict[str, Tensor]], tuple[Tensor, Tensor | None]]


@dataclass(frozen=True, kw_only=True)
class Errors:
    """How far split and alone are apart: loss and logits relative to their size, gradients to their parameter's."""

    loss: float
    logits: float
    gradient: float
    parameter: str

    def require(self, where: str) -> None:
        """Raise UnsupportedError when an error is above TOLERANCE, or is no number."""
        for name, value in (("loss", self.loss), ("logits", self.logits), ("gradient", self.gradient)):
            if not value <= TOLERANCE:
                what = f"the gradient of {self.parameter}" if name == "gradient" else name
                raise UnsupportedError(f"{what} is off by {value:.2g} {where}: split over ranks it is another model "
                                       "(tokens meet outside attention, or a shard is taken for a whole)",
                                       field="audit")  # fmt: skip

    def worse(self, other: Errors) -> Errors:
        """Return the larger of each error."""
        largest = self if self.gradient >= other.gradient else other
        return replace(largest, loss=max(self.loss, other.loss), logits=max(self.logits, other.logits))


@dataclass(kw_only=True)
class Run:
    """What one way of running a model gave. gradients: by parameter, None where there is none."""

    loss: float
    logits: Tensor | None
    gradients: dict[str, Tensor | None]


def prove(model: PreTrainedModel) -> dict[str, Errors]:
    """Run a small float64 model every way and return the errors by road. UnsupportedError says what does not agree.

    What the model's own code raises comes through as it is.
    """
    model.train()
    batches = [random_batch(model, seed) for seed in (1, 2)]
    with torch.no_grad():
        _, calls = _Split(model, _own_loss).together(batches[0])
    check_calls(calls, model)  # first: it turns many away in a moment
    alone = [run_alone(copy.deepcopy(model), batch) for batch in batches]
    _check_memory(model, batches, alone)
    _check_participation(model, alone[0])
    errors: dict[str, Errors] = {}
    for road, step in ROADS.items():
        split = _Split(model, step)
        for batch, expected in zip(batches, alone, strict=True):
            found = compare(split.run(batch), expected)
            found.require(f"by the loss of {road}")
            errors[road] = found if road not in errors else errors[road].worse(found)
    return errors


def compare(split: Run, alone: Run) -> Errors:
    """Return how far two runs are apart; NaN counts as infinitely far."""
    loss = abs(split.loss - alone.loss) / max(abs(alone.loss), 1e-30)
    logits = 0.0
    if split.logits is not None and alone.logits is not None:
        logits = _relative(split.logits, alone.logits)
    largest = max((float(g.abs().max()) for g in alone.gradients.values() if g is not None and g.numel()), default=0.0)
    worst, parameter = 0.0, ""
    for name, expected in alone.gradients.items():
        got = split.gradients.get(name)
        given = got if expected is None else expected
        if given is not None:
            zero = torch.zeros_like(given)
            pair = (zero if one is None else one for one in (got, expected))
            error = _relative(*pair, floor=NOISE_FLOOR * largest)
            if not error <= worst:
                worst, parameter = error, name
    return Errors(loss=loss, logits=logits, gradient=worst, parameter=parameter)


def _relative(got: Tensor, expected: Tensor, *, floor: float = 0.0) -> float:
    if got.shape != expected.shape or not got.numel():
        return 0.0 if got.shape == expected.shape else float("inf")
    scale = max(float(expected.abs().max()), floor, 1e-300)
    error = float((got - expected).abs().max()) / scale
    return float("inf") if math.isnan(error) else error


def audited_plan(model: ModelShape) -> Plan:
    """Return a dense plan in float64, in stripes over two ranks, the last one padded. The proof takes its placement."""
    return make_plan(
        attention=AttentionSpec(
            model=model, seq_len_tokens=AUDITED_TOKENS, block_size=64, dtype="float64", columns_capacity=0
        ),
        placement=striped(seq_len_tokens=AUDITED_TOKENS, world_size=RANKS, granularity_tokens=STRIPE_TOKENS),
        forward=Gather(), backward=Ring(), pattern=dense_pattern(AUDITED_TOKENS),
        kernels=KernelSpec(backend="blockwise"),
    )  # fmt: skip


def random_batch(model: PreTrainedModel, seed: int) -> dict[str, Tensor]:
    """Return "input_ids" and "labels" [1, AUDITED_TOKENS]; some labels do not count."""
    generator = torch.Generator().manual_seed(seed)
    ids = random_ids(model, AUDITED_TOKENS, generator)
    ignored = torch.rand(ids.shape, generator=generator) < GAP_SHARE
    return {"input_ids": ids, "labels": ids.masked_fill(ignored, IGNORED_LABEL)}


def run_alone(model: PreTrainedModel, batch: dict[str, Tensor]) -> Run:
    """Return what a model gives by its own attention and loss."""
    with Double():
        output = model(**batch)
        if computes_own_loss(model, model_body(model)) and not _shifts_labels(output, batch["labels"]):
            output = model(**batch | {"labels": _shifted(batch["labels"])})
        output.loss.backward()
    return Run(loss=output.loss.item(), logits=output.logits.detach(), gradients=_gradients([model]))


def _shifts_labels(output: Any, labels: Tensor) -> bool:
    """Whether a class's own loss was of each label with the logits of the token before it, rather than its own."""
    count = (labels != IGNORED_LABEL).sum()
    own = float(token_loss(output.logits.detach(), labels, count))
    return abs(float(output.loss) - own) > TOLERANCE * abs(own)


def _shifted(labels: Tensor) -> Tensor:
    return torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED_LABEL)


@cache
def _placed_plan() -> Plan:
    return audited_plan(ModelShape(layers=1, heads=1, kv_heads=1, head_dim=8))


class _Split:
    """Two copies of a model, a shard each; step: what a copy computes of its shard."""

    def __init__(self, model: PreTrainedModel, step: Step) -> None:
        self.twins = [copy.deepcopy(model) for _ in range(RANKS)]
        self.step, self.plan = step, _placed_plan()
        placement = self.plan.make_placement()
        self.positions = [torch.from_numpy(placement.positions(rank)) for rank in range(RANKS)]

    def run(self, batch: dict[str, Tensor]) -> Run:
        """Return the loss, the logits in the order of the sequence, and the gradients of both together."""
        for twin in self.twins:
            twin.zero_grad()
        results, _ = self.together(batch)
        with Double():
            total = torch.stack([loss for loss, _ in results]).sum()
            total.backward()
        logits = None
        if all(own is not None for _, own in results):
            everywhere = torch.cat([own.detach() for _, own in results], dim=1)
            logits = everywhere[:, torch.argsort(torch.cat(self.positions))][:, :AUDITED_TOKENS]
        return Run(loss=total.item(), logits=logits, gradients=_gradients(self.twins))

    def together(self, batch: dict[str, Tensor]) -> tuple[list[tuple[Tensor, Any]], list[AttentionCall]]:
        """Return what both gave in a forward pass, and what one of them asked of attention."""
        meeting = Meeting(self.positions, AUDITED_TOKENS)
        attentions = [MetAttention(meeting, rank) for rank in range(RANKS)]
        with ExitStack() as ends:
            works: list[Callable[[], Any]] = []
            for rank, (twin, attention, own) in enumerate(zip(self.twins, attentions, self.positions, strict=True)):
                router = router_loss_of(twin, own < AUDITED_TOKENS, attention.total)
                attached = Attached(twin, attention, positions=own, seq_len_tokens=AUDITED_TOKENS, router=router)
                ends.callback(attached.detach)
                works.append(partial(self.step, attached, shard(batch, self.plan, rank)))
            return run_together(works, meeting), attentions[0].calls


def _own_loss(attached: Attached, part: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
    output: Any = attached.model(**part)
    return output.loss, output.logits


def _fused_loss(attached: Attached, part: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
    fused = ModelWithLoss(attached.model, "chunked", chunk_tokens=48)
    loss = fused(part["input_ids"], part["position_ids"], part["labels"]) / part["num_items_in_batch"]
    if attached.router is not None:
        loss = loss + attached.router.coefficient * attached.router.take()
    return loss, None


ROADS: dict[str, Step] = {"attach": _own_loss, "train": _fused_loss}


def _gradients(models: list[PreTrainedModel]) -> dict[str, Tensor | None]:
    """Return the sum over copies of every parameter's gradient; None where none has one."""
    summed: dict[str, Tensor | None] = {}
    for model in models:
        for name, parameter in model.named_parameters():
            before, own = summed.get(name), parameter.grad
            summed[name] = before if own is None else own.clone() if before is None else before + own
    return summed


def _check_memory(model: PreTrainedModel, batches: list[dict[str, Tensor]], alone: list[Run]) -> None:
    """What a model computes must not depend on what it was called with before."""
    used = copy.deepcopy(model)
    run_alone(used, batches[0])
    used.zero_grad()
    compare(run_alone(used, batches[1]), alone[1]).require("when it is called a second time, alone")


def _check_participation(model: PreTrainedModel, alone: Run) -> None:
    """Every parameter that ever gets a gradient gets one from any tokens, so that ranks reduce the same set."""
    few = copy.deepcopy(model)
    with Double():
        few(input_ids=torch.tensor([[3, 4, 5]]), labels=torch.tensor([[3, 4, 5]])).loss.backward()
    for name, gradient in _gradients([few]).items():
        if gradient is None and alone.gradients[name] is not None:
            raise UnsupportedError("gets a gradient only from some tokens: ranks would reduce different parameters",
                                   field=name)  # fmt: skip
