"""All parts of a report, in their order, and the facts that stand as cards below the first sentence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ....planner.plan import Plan
from ....traces.dataset.store import Trace
from ....traces.stats import describe
from ..answer import Answer, answer_of, headline
from ..certainty import comparisons
from ..inputs import Inputs
from ..words import duration, percent
from .evaluation import evaluation_part
from .part import Part
from .plans import layouts_part, plans_part
from .results import results_part, training_part
from .times import fidelity_part, timelines_part, waterfall_part
from .work import load_part, masks_part, plan_loads


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a page shows: the answer, cards as (value, what it is), the parts."""

    answer: Answer
    cards: tuple[tuple[str, str], ...]
    parts: tuple[Part, ...]


def make_report(inputs: Inputs) -> Report:
    """Return the report on what was found; parts without data are left out."""
    rows, plan = comparisons(inputs), headline(inputs)
    answer = answer_of(inputs, rows, plan)
    others = [one for _, one in inputs.plans if one is not plan]
    plans: list[Plan] = [plan, *others] if plan is not None else []
    spread = plan_loads(inputs, plans)
    traces = _traces(inputs, plan)
    parts = (
        layouts_part(inputs, plan),
        waterfall_part(inputs, plans, spread),
        masks_part(traces),
        load_part(spread),
        timelines_part(inputs),
        fidelity_part(inputs, rows),
        training_part(inputs.runs, answer.saving, inputs.planned_steps),
        evaluation_part(inputs.evaluations),
        plans_part(inputs),
        results_part(inputs.results),
    )
    return Report(answer=answer, cards=tuple(_cards(inputs, answer, traces)), parts=tuple(filter(None, parts)))


def _traces(inputs: Inputs, plan: Plan | None) -> list[Trace]:
    """Return the traces, that of the plan first."""
    first = None if plan is None else inputs.trace_of(plan)
    return sorted(inputs.traces, key=lambda trace: trace is not first)


def _cards(inputs: Inputs, answer: Answer, traces: Sequence[Trace]) -> list[tuple[str, str]]:
    cards = []
    if answer.gain is not None and answer.plan is not None:
        times = f"{duration(answer.gain.baseline_us)} → {duration(answer.gain.plan_us)}"
        cards.append(
            (times, "attention of one layer, forward and backward: best layout without a planner → the plan, predicted")
        )
        gap = f"{answer.plan.predictions['gap'] + 1:.2f} ×"
        cards.append((gap, "the plan's time over a lower bound that no schedule can beat"))
    if traces and traces[0].steps:
        cards.append(_density(traces[0]))
    if inputs.runs:
        run = next((one for one in inputs.runs if one.sparse), inputs.runs[0])
        run = run if answer.saving is None else answer.saving.run
        cards.append((f"{run.middle('tokens_per_s') or 0:,.0f} tokens/s", f"median of the training run {run.name}"))
        told = f"{run.steps:,} optimizer steps on {run.ranks} ranks"
        cards.append((f"{run.gpu_hours:,.3g} GPU-hours", f"{told} of that run"))
    return cards


def _density(trace: Trace) -> tuple[str, str]:
    rows: list[dict[str, Any]] = describe(trace)["layers"]
    density, columns = (sum(row[name] for row in rows) / len(rows) for name in ("density_mean", "columns_mean"))
    kept = [row["kept_mass_sampled_mean"] for row in rows if row.get("kept_mass_sampled_mean") is not None]
    told = f"share of causal blocks that stay active, beside {columns:,.0f} token columns a head"
    if kept:
        told += f"; {percent(sum(kept) / len(kept))} of the attention is kept"
    return f"{density:.2f} density", told
