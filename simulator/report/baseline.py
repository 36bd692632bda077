"""What a plan says of the layouts that the search compared: the rows, the baseline, and what planning saves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from ...planner.plan import Plan

Row: TypeAlias = Mapping[str, Any]
MOST_ROWS = 18
WORTH_IT = 0.01  # as the planner's verdict: a smaller gain is none


def compared(plan: Plan) -> bool:
    """Return whether the plan's file holds a search's predictions: plans made by hand have none."""
    return all(plan.predictions.get(name) is not None for name in ("candidates", "step_time_us", "bound_us"))


def best_baseline(plan: Plan) -> Row | None:
    """Return the row of the plain layout that the plan is compared with, None where there is none."""
    told = plan.predictions
    best_us = told.get("best_baseline_us")
    rows = [row for row in told.get("candidates") or () if row["baseline"] and row["step_time_us"] == best_us]
    named = [row for row in rows if str(row["in_words"]) in str(told.get("best_baseline"))]
    return next(iter(named or rows), None)


@dataclass(frozen=True, kw_only=True)
class Gain:
    """What the plan takes beside its baseline, microseconds of forward and backward of one layer, as predicted."""

    plan_us: float
    baseline_us: float
    baseline: str

    @property
    def ratio(self) -> float:
        """The baseline's time over the plan's."""
        return self.baseline_us / self.plan_us if self.plan_us else 1.0

    @property
    def saved_share(self) -> float:
        """Share of the baseline's time that the plan saves; negative where it is slower."""
        return 1.0 - self.plan_us / self.baseline_us

    @property
    def helps(self) -> bool:
        """Whether the plan is quicker by more than predictions can tell apart."""
        return self.ratio >= 1.0 + WORTH_IT


def gain_of(plan: Plan) -> Gain | None:
    """Return the gain that the plan predicts, None where it has nothing to be compared with."""
    told = plan.predictions
    baseline_us = told.get("best_baseline_us")
    if not compared(plan) or not baseline_us:
        return None
    return Gain(plan_us=told["step_time_us"], baseline_us=baseline_us, baseline=str(told["best_baseline"]))


@dataclass(frozen=True, kw_only=True)
class Bar:
    """A layout's predicted time. role: "plan", "baseline", "plain" or "other"."""

    name: str
    note: str
    role: str
    forward_us: float
    backward_us: float
    step_time_us: float


def layout_bars(plan: Plan) -> list[Bar]:
    """Return at most 18 layouts, quickest first: all plain ones, the best others, and the plan itself."""
    told, baseline = plan.predictions, best_baseline(plan)
    plain = [row for row in told["candidates"] if row["baseline"]]
    others = [row for row in told["candidates"] if not row["baseline"]]
    others.sort(key=lambda row: (row["evaluator"] != told["evaluator"], row["step_time_us"]))
    bars = [_bar(row, told["evaluator"], baseline) for row in [*plain, *others[: max(0, MOST_ROWS - 1 - len(plain))]]]
    picked = _timed(told, name="the plan", note=in_words(plan), role="plan")
    return sorted([picked, *bars], key=lambda bar: (bar.step_time_us, bar is not picked))


def _bar(row: Row, evaluator: str, baseline: Row | None) -> Bar:
    role = "baseline" if row is baseline else "plain" if row["baseline"] else "other"
    remarks = [
        "the baseline" if role == "baseline" else "plain" if role == "plain" else "",
        row["why_not"] or "",
        "" if row["fits_memory"] else "too large",
        "" if row["evaluator"] == evaluator else "estimate",
    ]
    name = f"{row['placement']} {row['granularity_tokens']}, {row['in_words']}"
    return _timed(row, name=name, note=", ".join(filter(None, remarks)), role=role)


def _timed(row: Row, **said: str) -> Bar:
    times = {key: float(row[key]) for key in ("forward_us", "backward_us", "step_time_us")}
    return Bar(name=said["name"], note=said["note"], role=said["role"], **times)


def in_words(plan: Plan) -> str:
    """Return what a plan does, in a few words."""
    forward, backward = str(plan.forward.value), str(plan.backward.value)
    placed = f"{plan.placement.name} placement in units of {plan.placement.granularity_tokens} tokens"
    if forward == backward:
        return f"{placed}, {forward}"
    return f"{placed}, forward {forward}, backward {backward}"
