"""How sure a prediction is: what was measured beside it, in these files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ...planner.plan import Plan
from ...traces.errors import InputError
from ..comparisons import Comparison, read_comparisons
from ..validate import judge
from .inputs import Inputs
from .words import percent

SPREAD = 0.01  # of repeats, of rows that state none: as `validate` has it
TIMES = ("step", "backward", "forward")


@dataclass(frozen=True, kw_only=True)
class Band:
    """How far predictions were off. share: 0.07 is 7 %; own: measured on the plan itself, else on other ones."""

    share: float
    words: str
    own: bool


def comparisons(inputs: Inputs) -> list[Comparison]:
    """Return every measured value beside its prediction: of pairs of timelines, and of results that hold both."""
    together = [*([path] for path, _ in inputs.results), *_paired_timelines(inputs)]
    return [row for paths in together for row in _read(paths)]


def _read(paths: list[Path]) -> tuple[Comparison, ...]:
    try:
        return read_comparisons(paths, spread=SPREAD).rows
    except InputError:
        return ()  # a benchmark without predictions: nothing is compared


def _paired_timelines(inputs: Inputs) -> list[list[Path]]:
    """Return [simulated, measured] paths for each plan of which both are there; of several, the first of each."""
    pairs: dict[str, dict[str, Path]] = {}
    for path, line in inputs.timelines:
        if (digest := line.plan_digest) is not None:
            pairs.setdefault(digest, {}).setdefault(line.source, path)
    return [[one["simulated"], one["measured"]] for one in pairs.values() if len(one) == 2]


def band_of(inputs: Inputs, plan: Plan, rows: Sequence[Comparison]) -> Band | None:
    """Return how far predictions were off: of the plan itself where it was measured, else of all that is there."""
    mine = [row for row in rows if row.configuration == f"plan {plan.digest[:12]}" and row.quantity == "step"]
    if mine:
        error = max((row.error for row in mine), key=abs)
        length = "shorter" if error < 0 else "longer"
        words = f"its simulated step was {percent(abs(error))} {length} than the measured one"
        return Band(share=abs(error), words=words, own=True)
    verdicts = judge(rows)
    for quantity in TIMES:
        errors = verdicts[quantity].errors if quantity in verdicts else None
        if errors is not None:
            return _others(errors.rows, errors.median, errors.p95)
    for _, document in inputs.validations:
        for quantity in TIMES:
            told = document.quantities.get(quantity)
            if told is not None and told.errors is not None:
                return _others(told.errors.rows, told.errors.median, told.errors.p95)
    return None


def _others(count: int, middle: float, most: float) -> Band:
    if count == 1:
        return Band(share=most, words=f"the one prediction measured in these files was {percent(most)} off", own=False)
    words = (
        f"predictions measured in these files were {percent(middle)} off in the median, "
        f"{percent(most)} at the 95th percentile"
    )
    return Band(share=most, words=words, own=False)
