"""Where the time goes: waterfalls of a step, timelines, and how near predictions come to measurements."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ....planner.plan import Plan
from ....traces.timeline import Timeline
from ...comparisons import Comparison, Quantity
from ...validate import Verdict, judge
from ..figures.fidelity import fidelity_figure, quantities_of
from ..figures.timelines import kinds_of, shown_ranks, streams_of, timeline_figure
from ..inputs import Inputs
from ..spread import Loads
from ..waits import Waits, waits_of
from .part import Part, drawing

MOST_GROUPS = 3


@dataclass(frozen=True, kw_only=True)
class Step:
    """A timeline with what the page calls it."""

    name: str
    role: str
    timeline: Timeline


def waterfall_part(
    inputs: Inputs, ordered: Sequence[Plan], spread: Sequence[tuple[Plan, int, list[Loads]]]
) -> Part | None:
    """Return waterfalls of a step: of the baseline and the plan where they were simulated, and of all timelines."""
    groups = []
    plans = {plan.digest: plan for plan in ordered}
    simulated = {plan.digest: loads for plan, _, loads in spread}
    given = {line.plan_digest for _, line in inputs.timelines}
    for digest in [*plans, *(one for one in given if one not in plans)]:
        steps = _steps(inputs, digest, simulated.get(str(digest), []))
        if steps and len(groups) < MOST_GROUPS:
            groups.append({"title": _title(plans.get(str(digest)), digest), "steps": _waterfalls(steps)})
    if not groups:
        return None
    return Part(template="waterfall", title="Where the time of a step goes", values={"groups": groups})


def _steps(inputs: Inputs, digest: Any, loads: Sequence[Loads]) -> list[Step]:
    own = [(path, line) for path, line in inputs.timelines if line.plan_digest == digest]
    sources = {line.source for _, line in own}
    steps = [
        Step(name=f"{'the plan' if one.role == 'plan' else 'the baseline'}, simulated", role=one.role,
             timeline=one.timeline)
        for one in loads
        if one.timeline is not None and (one.role == "baseline" or (one.role == "plan" and "simulated" not in sources))
    ]  # fmt: skip
    order = sorted(own, key=lambda one: one[1].source != "simulated")
    return steps + [Step(name=f"the plan, {line.source}", role="plan", timeline=line) for _, line in order]


def _title(plan: Plan | None, digest: object) -> str:
    if plan is None:
        return f"plan {str(digest)[:12]}" if digest else "timelines that name no plan"
    where = plan.provenance.get("cluster")
    return f"{plan.world_size} ranks" + (f", {where}" if where else "")


def _waterfalls(steps: Sequence[Step]) -> list[dict[str, Any]]:
    found = [(step, waits_of(step.timeline)) for step in steps]
    sources = {step.timeline.source for step, _ in found}
    longest = {
        source: max(waits.total_us for step, waits in found if step.timeline.source == source) for source in sources
    }
    return [
        {"name": step.name, "total_us": waits.total_us, "bars": _bars(waits, longest[step.timeline.source])}
        for step, waits in found
        if waits.total_us > 0
    ]


def _bars(waits: Waits, longest_us: float) -> list[dict[str, Any]]:
    pieces = (
        ("compute, forward", "blue", waits.forward_us),
        ("compute, backward", "navy", waits.backward_us),
        ("exposed communication", "purple", waits.communication_us),
        ("launches, host, data not sent yet", "orange", waits.other_us),
        ("done, waiting for other ranks", "grey", waits.waiting_us),
    )
    bars, start = [], 0.0
    for name, colour, us in pieces:
        place = {"start": start / longest_us, "length": us / longest_us}
        bars.append({"name": name, "colour": colour, "us": us, "share": us / waits.total_us, **place})
        start += us
    return bars


def timelines_part(inputs: Inputs) -> Part | None:
    """Return the timelines of each plan, the simulated one above the measured one, on axes of one length."""
    groups: dict[Any, list[tuple[Path, Timeline]]] = {}
    for path, line in inputs.timelines:
        if line.spans:
            groups.setdefault(line.plan_digest, []).append((path, line))
    if not groups:
        return None
    plans = {plan.digest: plan for _, plan in inputs.plans}
    shown = [
        _lines(number, _title(plans.get(str(digest)), digest), lines)
        for number, (digest, lines) in enumerate(list(groups.items())[:MOST_GROUPS], start=1)
    ]
    both = any({"simulated", "measured"} <= {line["source"] for line in group["lines"]} for group in shown)
    title = "Simulated and measured timelines" if both else "Timelines"
    return Part(template="timelines", title=title, values={"groups": shown, "left_out": len(groups) - len(shown)})


def _lines(number: int, title: str, lines: Sequence[tuple[Path, Timeline]]) -> dict[str, Any]:
    ordered = sorted(lines, key=lambda one: one[1].source != "simulated")[:4]
    timelines = [line for _, line in ordered]
    ranks, streams = shown_ranks(timelines), streams_of(timelines)
    until_us = max(line.makespan_us for line in timelines)
    drawn = []
    for place, (path, line) in enumerate(ordered, start=1):
        figure = timeline_figure(line, ranks=ranks, streams=streams, until_us=until_us)
        label = f"{line.source} timeline of {line.world_size} ranks, {line.makespan_us / 1e3:,.1f} ms"
        picture = drawing(f"timeline-{number}-{place}", figure, label)
        drawn.append({"source": line.source, "file": path.name, "us": line.makespan_us, "figure": picture})
    world = max(line.world_size for line in timelines)
    return {"title": title, "lines": drawn, "kinds": kinds_of(timelines), "ranks": ranks, "of": world}


def fidelity_values(rows: Sequence[Comparison], verdicts: Mapping[Quantity, Verdict]) -> dict[str, Any]:
    """Return the table and the scatters of measured values beside predictions, as their template wants them."""
    times = [row for row in rows if row.quantity != "memory"]
    memory = [row for row in rows if row.quantity == "memory"]
    figures = []
    for name, own, unit, scale in (("times", times, "ms", 1e-3), ("memory", memory, "GB", 1e-9)):
        if own:
            figure = drawing(name, fidelity_figure(own, unit=unit, scale=scale), f"{name}: predicted over measured")
            title = "Time" if name == "times" else "Memory"
            figures.append({"title": title, "figure": figure, "quantities": quantities_of(own)})
    return {"verdicts": verdicts, "figures": figures, "calibration": any(row.calibration for row in rows)}


def fidelity_part(inputs: Inputs, rows: Sequence[Comparison]) -> Part | None:
    """Return how near predictions come: of what was compared here, else as a validation in the files has it."""
    title = "How near predictions come to measurements"
    if rows:
        return Part(template="fidelity", title=title, values=fidelity_values(rows, judge(rows)) | {"told": []})
    told = [
        {"file": path.name, "name": name, "errors": one.errors}
        for path, document in inputs.validations
        for name, one in document.quantities.items()
        if one.errors is not None
    ]
    if not told:
        return None
    return Part(template="fidelity", title=title, values={"verdicts": {}, "figures": [], "calibration": False,
                                                          "told": told})  # fmt: skip
