"""What `simulate` and `compare` print for people: the answer first, then tables with units."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

from ..traces.output import Table, offer_report, say, show
from .metrics import DirectionMetrics

Side = Mapping[str, DirectionMetrics]  # by direction
FIGURES = {
    "makespan_us": "makespan ms",
    "compute_mean_us": "compute ms, mean over ranks",
    "exposed_mean_us": "exposed ms, mean over ranks",
    "tail_mean_us": "waiting for the last rank ms, mean",
    "worker_imbalance": "worker imbalance",
    "step_imbalance": "step imbalance",
}
PHASE_FIGURES = {
    "compute_mean_us": "compute",
    "compute_max_us": "longest",
    "exposed_mean_us": "exposed",
    "transfer_us": "transfer",
}


def show_simulation(facts: Mapping[str, Any], metrics: Sequence[DirectionMetrics]) -> None:
    """Print what a layer takes, how sure that is, and where the time of each direction goes."""
    parts = ", ".join(f"{one.direction} {_ms(one.makespan_us)}" for one in metrics)
    whole_us = sum(one.makespan_us for one in metrics)
    exposed = sum(one.exposed_mean_us for one in metrics) / whole_us if whole_us else 0.0
    gpus = facts["gpus"]
    where = f"on {gpus['used']} GPUs of {facts['cluster']}"
    say(
        f"One layer takes {_ms(facts['step_time_us'])} ({parts}) {where}; ranks wait for {exposed:.1%} of it. "
        f"Simulated; {facts['validity']}.",
        answer=True,
    )
    rows = [
        (
            one.direction, *map(_figure, (one.makespan_us, one.compute_mean_us, one.exposed_mean_us)),
            f"{one.exposed_mean_us / one.makespan_us:.1%}", f"{one.worker_imbalance:.3f}", f"{one.step_imbalance:.3f}",
        )
        for one in metrics
    ]  # fmt: skip
    show(
        Table(
            title=f"layer {facts['layer']} of training step {facts['training_step']}",
            columns=("", "makespan ms", "compute ms", "exposed ms", "exposed", "worker", "phases"),
            rows=rows,
            note="compute, exposed (waiting for transfers or for other ranks): means over ranks, they add up to the "
            "makespan; worker, phases: worker and step imbalance",
        )
    )
    say(f"buffers: {facts['peak_buffer_bytes'] / 1e6:,.1f} MB on a rank at most")
    if gpus["used"] < gpus["of"]:
        say(f"{gpus['used']} of the cluster's {gpus['of']} GPUs are used: the plan has no more ranks")
    if facts["timeline"]:
        say(f"timeline: {facts['timeline']} (open it in https://ui.perfetto.dev)")
        offer_report(facts["plan"], facts["timeline"])


def show_comparison(names: Sequence[str], sides: Sequence[Side]) -> None:
    """Print how much longer B takes than A, and for each direction its figures and its phases."""
    say(_comparison_answer(names, sides), answer=True)
    for direction in dict.fromkeys([*sides[0], *sides[1]]):
        both = [side.get(direction) for side in sides]
        show(_figures_table(direction, both))
        show(_phases_table(direction, both))


def _comparison_answer(names: Sequence[str], sides: Sequence[Side]) -> str:
    """Return one line: the time of both, over the directions that both have, and their ratio."""
    shared = [direction for direction in sides[0] if direction in sides[1]]
    if not shared:
        return f"A is {names[0]}, B is {names[1]}: they have no direction in common."
    first_us, second_us = (sum(side[direction].makespan_us for direction in shared) for side in sides)
    ratio = f"{second_us / first_us:.3f} times as long as A" if first_us else "some time, A none"
    return (
        f"B takes {ratio}: {_ms(second_us)} against {_ms(first_us)}, {' and '.join(shared)}. A is {names[0]}, B is "
        f"{names[1]}."
    )


def _figures_table(direction: str, sides: Sequence[DirectionMetrics | None]) -> Table:
    rows = []
    for name, told in FIGURES.items():
        values = [None if side is None else getattr(side, name) for side in sides]
        show_one = _figure if name.endswith("_us") else "{:.3f}".format
        ratio = f"{values[1] / values[0]:.3f}" if values[0] and values[1] is not None else "–"
        rows.append((told, *("–" if value is None else show_one(value) for value in values), ratio))
    return Table(title=direction, columns=("", "A", "B", "B / A"), rows=rows)


def _phases_table(direction: str, sides: Sequence[DirectionMetrics | None]) -> Table:
    """One row for a phase; of each figure, A's column and then B's."""
    phases = [{one.phase: one for one in side.phases} if side else {} for side in sides]
    rows = []
    for phase in sorted({*phases[0], *phases[1]}):
        cells = (_figure(getattr(side[phase], name)) if phase in side else "–"
                 for name, side in product(PHASE_FIGURES, phases))  # fmt: skip
        rows.append((str(phase), *cells))
    return Table(
        title=f"{direction}, phase by phase, in ms",
        columns=("phase", *(f"{told} {side}" for told, side in product(PHASE_FIGURES.values(), "AB"))),
        rows=rows,
        note="compute, exposed: means over ranks; longest: compute of the slowest rank; transfer: the longest group "
        "call that was launched in the phase",
    )


def _ms(us: float) -> str:
    return f"{us / 1000:,.3f} ms" if us < 1e6 else f"{us / 1e6:,.3f} s"


def _figure(us: float) -> str:
    return f"{us / 1000:,.3f}" if us < 1e5 else f"{us / 1000:,.1f}"
