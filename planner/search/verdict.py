"""What a plan predicts, as plain JSON values, and one sentence on whether planning was worth it."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from .problem import Problem
from .scores import Step
from .selection import MOST_SIMULATED_RANKS, Selection

WORTH_IT = 0.01  # a smaller gain is within what predictions can tell apart


def predictions(problem: Problem, selection: Selection) -> dict[str, Any]:
    """Return the `predictions` of a plan file: of the pick, of its distance to the bound, of all candidates."""
    pick, best = selection.pick, selection.best_baseline
    rated_samples = [problem.samples[number] for number in pick.rater.samples]
    return {
        "verdict": verdict(selection, restricted=bool(problem.space.layouts or problem.space.placements)),
        "evaluator": pick.rater.name,
        "unvalidated": problem.cluster.origin == "datasheet",
        **step_figures(pick),
        "pick": _picked_row(pick),
        "exposed_us": round(pick.exposed_us, 3),
        "exposed_fraction": round(pick.exposed_us / pick.step_time_us, 6) if pick.step_time_us else 0.0,
        "peak_buffer_bytes": pick.peak_buffer_bytes,
        "memory_bytes": pick.memory_bytes,
        "memory_parts_bytes": {name: size for name, size in asdict(pick.memory).items() if size},
        "memory_limit_bytes": problem.memory_limit_bytes,
        "bound_us": round(selection.bound_us, 3),
        "gap": round(pick.step_time_us / selection.bound_us - 1.0, 6) if selection.bound_us else 0.0,
        "best_baseline": str(best) if best else None,
        "best_baseline_us": round(best.step_time_us, 3) if best else None,
        "sampled_layers": [[sample.training_step, sample.layer] for sample in rated_samples],
        "candidates": [candidate_row(step, plain=step in selection.baselines) for step in selection.table],
        "notes": _notes(problem, selection),
    }


def _picked_row(pick: Step) -> dict[str, Any] | None:
    """Return what finds the pick in the table; None where its directions have different layouts."""
    if pick.forward_layout != pick.backward_layout:
        return None
    return {
        "placement": pick.placement.name,
        "granularity_tokens": pick.placement.granularity_tokens,
        "layout": pick.forward_layout.name,
        "parameters": pick.forward_layout.parameters,
    }


def step_figures(step: Step) -> dict[str, float]:
    """Return times and imbalances of a step, rounded to nanoseconds and millionths."""
    return {
        "forward_us": round(step.forward.makespan_us, 3),
        "backward_us": round(step.backward.makespan_us, 3),
        "step_time_us": round(step.step_time_us, 3),
        "worker_imbalance": round(step.worker_imbalance, 6),
        "step_imbalance": round(step.step_imbalance, 6),
    }


def candidate_row(step: Step, *, plain: bool) -> dict[str, Any]:
    """Return one row of the table of candidates; both directions have the same layout there."""
    return {
        "placement": step.placement.name,
        "granularity_tokens": step.placement.granularity_tokens,
        "layout": step.forward_layout.name,
        "parameters": step.forward_layout.parameters,
        "in_words": str(step.forward_layout),
        "baseline": plain,
        "executable": step.why_not is None,
        "why_not": step.why_not,
        "fits_memory": step.fits_memory,
        "memory_bytes": step.memory_bytes,
        "evaluator": step.rater.name,
        **step_figures(step),
    }


def verdict(selection: Selection, *, restricted: bool = False) -> str:
    """Return one sentence: how much planning gains over the best plain layout, or that it would not help.

    restricted: the pick was restricted to some placements or layouts, and so may lose to a plain one.
    """
    best = selection.best_baseline
    if best is None:
        return "No plain layout fits the memory limit; this plan does."
    ratio = best.step_time_us / selection.pick.step_time_us if selection.pick.step_time_us else 1.0
    if restricted and ratio < 1.0 - WORTH_IT:
        return f"The plain layout {best} would be {1 / ratio:.2f}× quicker than this restricted plan."
    if ratio >= 1.0 + WORTH_IT:
        return f"Planning gains {ratio:.2f}× over the best plain layout ({best})."
    plainest = _best_of_the_plainest(selection)
    if plainest is not None and plainest.step_time_us <= (1.0 + WORTH_IT) * selection.pick.step_time_us:
        words = plainest.forward_layout.words
        return (
            f"Plain block striping with {words} is already best; planning would gain less than 1 %: "
            f"use it ({plainest})."
        )
    return f"A plain layout is already best; planning would gain less than 1 %: use {best}."


def _best_of_the_plainest(selection: Selection) -> Step | None:
    """Return the quickest of the plainest layout under the plainest placement, whatever its parameters."""
    first = selection.baselines[0]
    alike = [
        step
        for step in selection.baselines
        if step.placement == first.placement and step.forward_layout.name == first.forward_layout.name and step.eligible
    ]
    return min(alike, key=lambda step: step.step_time_us, default=None)


def _notes(problem: Problem, selection: Selection) -> list[str]:
    """Return what a reader should know of how the numbers came about."""
    summary = problem.summary
    rated, sampled = len(selection.pick.rater.samples), len(problem.samples)
    first = f"times are means over {rated} of {summary.recorded_layers} recorded layers"
    if rated < sampled:
        first += f": {sampled} were read, on {problem.cluster.world_size} GPUs fewer are played"
    notes = [first]
    if summary.loaded_layers < summary.recorded_layers:
        notes.append(f"balanced placements weigh {summary.loaded_layers} of them, evenly spread")
    if problem.cluster.world_size > MOST_SIMULATED_RANKS:
        notes.append(f"on more than {MOST_SIMULATED_RANKS} GPUs nothing is simulated: the recurrence has the last word")
    if selection.pick.step_time_us < selection.bound_us:
        notes.append("the recurrence overlooks that transfers share links: its time is below the bound")
    if problem.cluster.origin == "datasheet":
        notes.append(f"{problem.cluster.name} is a datasheet: its times are not validated by measurements")
    return [*notes, *selection.notes]
