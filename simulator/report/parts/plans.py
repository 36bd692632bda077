"""The plans: the layouts that a search compared with their bound, and all plans side by side."""

from __future__ import annotations

from typing import Any

from ....planner.plan import Plan
from ..answer import NOT_VALIDATED
from ..baseline import compared, gain_of, in_words, layout_bars
from ..inputs import Inputs
from .part import Part


def layouts_part(inputs: Inputs, plan: Plan | None) -> Part | None:
    """Return the layouts that the search of a plan compared, as bars of predicted time."""
    if plan is None or not compared(plan):
        return None
    told, bars = plan.predictions, layout_bars(plan)
    bound_us = float(told["bound_us"])
    longest = max(bound_us, *(bar.step_time_us for bar in bars))
    values = {
        "file": next(path.name for path, one in inputs.plans if one is plan),
        "several": len(inputs.plans) > 1,
        "told": told,
        "bars": bars,
        "estimates": any("estimate" in bar.note for bar in bars),
        "bound_us": bound_us,
        "bound_share": bound_us / longest,
        "longest_us": longest,
        "cluster": plan.provenance.get("cluster"),
        "sure": f"from data sheets, {NOT_VALIDATED}" if told.get("unvalidated", True) else "from measured prices",
    }
    return Part(template="layouts", title="The plan, its baseline and the other layouts", values=values)


def plans_part(inputs: Inputs) -> Part | None:
    """Return all plans in a table, where there are several."""
    if len(inputs.plans) < 2:
        return None
    return Part(template="plans", title="All plans", values={"rows": [_row(path.name, p) for path, p in inputs.plans]})


def _row(name: str, plan: Plan) -> dict[str, Any]:
    gain, told = gain_of(plan), plan.predictions
    return {
        "name": name,
        "cluster": plan.provenance.get("cluster") or "–",
        "ranks": plan.world_size,
        "tokens": plan.seq_len_tokens,
        "does": in_words(plan),
        "step_time_us": told.get("step_time_us"),
        "baseline": gain.baseline if gain else "–",
        "baseline_us": gain.baseline_us if gain else None,
        "saved": gain.saved_share if gain else None,
        "validated": "–" if not compared(plan) else "no" if told.get("unvalidated", True) else "measured prices",
    }
