"""The first sentence of a report: does planning help, by how much of a step and of a run, and how sure is that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ...planner.plan import Plan
from ..comparisons import Comparison
from .baseline import WORTH_IT, Gain, compared, gain_of
from .certainty import Band, band_of
from .inputs import Inputs
from .training import TrainingRun
from .words import duration, percent

NOT_VALIDATED = "not validated on such a cluster"


@dataclass(frozen=True, kw_only=True)
class Saving:
    """What the plan takes off a training run whose attention it arranged; share: of the run without it."""

    run: TrainingRun
    share: float
    gpu_hours: float
    steps: int


@dataclass(frozen=True, kw_only=True)
class Answer:
    """helps: "unknown" where nothing is compared, "maybe" where the error may exceed the gain."""

    helps: Literal["yes", "no", "maybe", "unknown"]
    sentence: str
    plan: Plan | None = None
    gain: Gain | None = None
    band: Band | None = None
    saving: Saving | None = None


def headline(inputs: Inputs) -> Plan | None:
    """Return the plan that the answer is about: one that was compared, of the most ranks, of equals one that ran."""
    plans = [plan for _, plan in inputs.plans]
    judged = [plan for plan in plans if compared(plan)]
    played = {line.plan_digest for _, line in inputs.timelines}
    return max(judged or plans, key=lambda plan: (plan.world_size, plan.digest in played), default=None)


def answer_of(inputs: Inputs, rows: Sequence[Comparison], plan: Plan | None) -> Answer:
    """Return the answer. rows: what was measured beside predictions. plan: what it is about."""
    if plan is None or not compared(plan):
        return Answer(helps="unknown", sentence=_unknown(inputs, plan), plan=plan)
    gain, band = gain_of(plan), band_of(inputs, plan, rows)
    if gain is None:
        return Answer(helps="yes", sentence=_no_baseline(plan), plan=plan, band=band)
    if gain.helps:
        doubted = band is not None and band.share >= gain.saved_share
        saving = saving_of(inputs, plan, gain)
        start = "Planning may help" if doubted else "Planning helps"
        parts = [f"{start}: {_by_how_much(plan, gain)}"]
        parts += [_of_a_run(saving)] if saving else []
        sentence = "".join(parts) + f"; {_how_sure(plan, band)}"
        sentence += ", which is more than the gain: it may be none." if doubted else "."
        return Answer(helps="maybe" if doubted else "yes", sentence=sentence, plan=plan, gain=gain, band=band,
                      saving=saving)  # fmt: skip
    return Answer(
        helps="no", sentence=f"{_no_gain(plan, gain)}; {_how_sure(plan, band)}.", plan=plan, gain=gain, band=band
    )


def saving_of(inputs: Inputs, plan: Plan, gain: Gain) -> Saving | None:
    """Return what the gain is in the training run of these files that the plan fits, None without one.

    The run's measured attention would take the gain's ratio longer under the baseline; all else stays.
    """
    for run in inputs.runs:
        attention_us, step_us = run.attention_us, run.middle("step_time_us")
        if run.sparse and attention_us and step_us and run.ranks % plan.world_size == 0:
            saved_us = attention_us * (gain.ratio - 1.0)
            steps = inputs.planned_steps or run.steps
            hours = saved_us * steps * run.ranks / 3.6e9
            return Saving(run=run, share=saved_us / (step_us + saved_us), gpu_hours=hours, steps=steps)
    return None


def _where(plan: Plan) -> str:
    cluster = plan.provenance.get("cluster")
    return f"on {plan.world_size} GPUs" + (f" ({cluster})" if cluster else "")


def _by_how_much(plan: Plan, gain: Gain) -> str:
    times = f"{duration(gain.plan_us)} instead of {duration(gain.baseline_us)} for forward and backward of one layer"
    less = f"the attention of a step takes {percent(gain.saved_share)} less than under {_named(gain)}"
    return f"{_where(plan)} {less}: {times}"


def _named(gain: Gain) -> str:
    return f"the best layout that needs no planner, “{gain.baseline}”"


def _of_a_run(saving: Saving) -> str:
    return (
        f", and the training run “{saving.run.name}” {percent(saving.share)} less "
        f"({saving.gpu_hours:,.3g} GPU-hours in {saving.steps:,} steps)"
    )


def _no_gain(plan: Plan, gain: Gain) -> str:
    start = f"Planning does not help: {_where(plan)}"
    if gain.saved_share < -WORTH_IT:
        lost = percent(1.0 - gain.baseline_us / gain.plan_us)
        return f"{start} {_named(gain)}, takes {lost} less than this plan, whose layouts were restricted"
    little = "it would save less than 1 % of the attention of a step, and still less of a run"
    return f"{start} {little}, over {_named(gain)}: use that one"


def _no_baseline(plan: Plan) -> str:
    sure = NOT_VALIDATED if plan.predictions.get("unvalidated", True) else "by prices measured on that cluster"
    alone = "all layouts that need no planner exceed the memory, and this plan fits into it"
    return f"Planning helps: {_where(plan)} {alone}; this is predicted, {sure}."


def _how_sure(plan: Plan, band: Band | None) -> str:
    unvalidated = plan.predictions.get("unvalidated", True)
    if band is not None and band.own:
        return f"this is predicted, and where the plan was measured {band.words}"
    if unvalidated:
        return f"this is predicted from data sheets and {NOT_VALIDATED}" + (f" ({band.words})" if band else "")
    told = "this is predicted from prices that were measured on that cluster"
    return f"{told}, and {band.words}" if band else f"{told}; no measured step in these files says how far that is off"


def _unknown(inputs: Inputs, plan: Plan | None) -> str:
    measured = _measured_runs(inputs.runs)
    if measured is not None:
        return measured
    if plan is not None:
        return "Whether planning helps is not known: no plan here was compared with layouts that need no planner."
    if inputs.evaluations and not inputs.traces:
        return inputs.evaluations[0][1].sentence
    have = "a trace" if inputs.traces else "measurements" if inputs.timelines or inputs.runs else "results"
    return f"Whether planning helps is not known yet: here are {have}, and no plan that says what it would gain."


def _measured_runs(runs: Sequence[TrainingRun]) -> str | None:
    """Return the sentence on a sparse and a dense run side by side, None without both."""
    sparse = next((run for run in runs if run.sparse), None)
    dense = next((run for run in runs if not run.sparse and sparse is not None and run.ranks == sparse.ranks), None)
    if sparse is None or dense is None:
        return None
    quick, slow = sparse.middle("tokens_per_s") or 0.0, dense.middle("tokens_per_s") or 1.0
    return (
        f"Sparse attention trains at {quick / slow:.2f} times the speed of dense attention here (measured on "
        f"{sparse.ranks} ranks: {quick:,.0f} and {slow:,.0f} tokens/s); what planning adds is not known: no plan is "
        "among these files."
    )
