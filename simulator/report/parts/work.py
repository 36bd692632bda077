"""What is attended to, and on which rank and in which phase that work falls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ....planner.plan import Plan
from ....planner.replay import recorded_layer
from ....traces.dataset.store import Trace
from ..baseline import in_words
from ..figures.load import load_figure
from ..figures.masks import chosen_heads, mask_figure
from ..inputs import Inputs
from ..spread import Loads, spread_loads
from .part import Part, drawing

MOST_TRACES = 2
MOST_PLANS = 3
MOST_SIMULATED_RANKS = 64
NAMES = {"before": "before", "baseline": "the baseline", "plan": "the plan"}


def masks_part(traces: Sequence[Trace]) -> Part | None:
    """Return maps of eight heads of each trace, of at most two traces."""
    shown = [_maps(number, trace) for number, trace in enumerate(traces[:MOST_TRACES], start=1) if trace.steps]
    if not shown:
        return None
    columns = any(one["columns"] for trace in shown for one in trace["maps"])
    values = {"traces": shown, "left_out": len(traces) - len(shown), "columns": columns}
    return Part(template="masks", title="What the heads attend to", values=values)


def _maps(number: int, trace: Trace) -> dict[str, Any]:
    maps = []
    for place, one in enumerate(chosen_heads(trace), start=1):
        label = f"Mask of layer {one.layer}, head {one.head}: density {one.density:.2f}"
        figure = drawing(f"masks-{number}-{place}", mask_figure(one), label)
        maps.append({"head": one, "figure": figure, "columns": one.pattern.columns.size})
    return {"trace": trace, "header": trace.header, "maps": maps, "step": trace.steps[-1]}


def plan_loads(inputs: Inputs, plans: Sequence[Plan]) -> list[tuple[Plan, int, list[Loads]]]:
    """Return (plan, layer, loads) of at most three plans whose traces are there; simulated where their cluster is."""
    found = []
    for plan in plans:
        trace = inputs.trace_of(plan)
        if trace is not None and trace.steps and len(found) < MOST_PLANS:
            recorded = recorded_layer(trace, None, None)
            cluster = inputs.cluster_of(plan) if plan.world_size <= MOST_SIMULATED_RANKS else None
            loads = spread_loads(plan, recorded.pattern, layer=recorded.layer, cluster=cluster)
            found.append((plan, recorded.layer, loads))
    return found


def load_part(spread: Sequence[tuple[Plan, int, list[Loads]]]) -> Part | None:
    """Return a map of rank × phase for each way to spread the work, before planning and after."""
    if not spread:
        return None
    groups = [_group(number, *one) for number, one in enumerate(spread, start=1)]
    return Part(template="load", title="How the work falls on ranks and phases", values={"groups": groups})


def _group(number: int, plan: Plan, layer: int, loads: Sequence[Loads]) -> dict[str, Any]:
    most = max(int(one.pairs.max()) for one in loads)
    maps = []
    for place, one in enumerate(loads, start=1):
        label = f"Work by rank and phase, {NAMES[one.role]}: {one.title}"
        figure = drawing(f"load-{number}-{place}", load_figure(one, most), label)
        maps.append({"figure": figure, "loads": one, "name": NAMES[one.role]})
    where = plan.provenance.get("cluster")
    title = f"{plan.world_size} ranks" + (f", {where}" if where else "")
    return {"title": title, "plan": plan, "layer": layer, "maps": maps, "most": most, "does": in_words(plan)}
