"""How near predictions are to what was measured: errors, the order of alternatives, the regret of the pick, tolerances.

An error is predicted / measured - 1. Rows that a calibration was fitted to are counted apart, never in the verdict.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..traces.errors import InputError, shown
from .comparisons import QUANTITIES, Comparison, Quantity, finite_share

APART = 3.0  # repeat spreads: measured times that are nearer to each other have no order
ORDERED: tuple[Quantity, ...] = ("forward", "backward", "step")
AT_MOST = ("median", "p95", "max", "bias", "regret")
FIGURES = (*AT_MOST, "tau")


@dataclass(frozen=True, kw_only=True)
class Errors:
    """Of so many rows: median, 95th percentile (linear between rows) and largest size of the error; bias: its median.

    Shares, 0.03 is three per cent.
    """

    rows: int
    median: float
    p95: float
    max: float
    bias: float


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One workload with several configurations: what the prediction would pick, and what was measured best.

    regret: the measured time of the pick over the best, less 1. Of equal predictions the slowest counts as picked.
    """

    group: str
    configurations: int
    picked: str
    best: str
    regret: float


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """One quantity. errors, calibration: of rows that were not, and were, fitted to; None where there are none.

    tau: Kendall's, over `pairs` of configurations of one workload whose measured times are more than three repeat
    spreads apart: agreeing less disagreeing pairs over all; a tie of predictions is neither. None without pairs.
    """

    quantity: Quantity
    errors: Errors | None
    calibration: Errors | None
    pairs: int = 0
    tau: float | None = None
    choices: tuple[Choice, ...] = ()

    @property
    def regret(self) -> float | None:
        """The largest, None without a choice."""
        return max((one.regret for one in self.choices), default=None)

    def figure(self, name: str) -> float | None:
        """Return a figure that tolerances name, as it is compared with them; None where there is none."""
        if name in ("tau", "regret"):
            return getattr(self, name)
        value = None if self.errors is None else getattr(self.errors, name)
        return abs(value) if value is not None else None


@dataclass(frozen=True, kw_only=True)
class Tolerance:
    """A bound on a figure of a quantity: tau must reach it, others must not exceed it."""

    quantity: Quantity
    figure: str
    value: float

    def missed(self, verdicts: Mapping[Quantity, Verdict]) -> str | None:
        """Return in one line how it is missed, None where it is met. What was not compared is missed."""
        verdict = verdicts.get(self.quantity)
        found = None if verdict is None else verdict.figure(self.figure)
        name = f"{self.quantity}.{self.figure}"
        if found is None:
            return f"{name}: nothing to judge it by"
        if self.figure == "tau":
            return None if found >= self.value else f"{name}: {found:.3f} is below {self.value:g}"
        return None if found <= self.value else f"{name}: {found:.2%} is above {self.value:.2%}"


def parse_tolerances(text: str) -> list[Tolerance]:
    """Read `step=0.03,step.p95=0.08,step.tau=0.9`; a quantity alone is its median. InputError names what is wrong."""
    found = []
    named: dict[str, Quantity] = {quantity: quantity for quantity in QUANTITIES}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, sign, value = part.partition("=")
        quantity, _, figure = name.strip().partition(".")
        known = named.get(quantity)
        if not sign or known is None or (figure or "median") not in FIGURES:
            told = f"{'|'.join(QUANTITIES)}[.{'|'.join(FIGURES)}]=number"
            raise InputError(f"{shown(part)} is not {told}", field="--tolerance")
        found.append(Tolerance(quantity=known, figure=figure or "median", value=finite_share(value, "--tolerance")))
    return found


def judge(rows: Sequence[Comparison]) -> dict[Quantity, Verdict]:
    """Return the verdict on each quantity that any row is about."""
    found = {}
    for quantity in QUANTITIES:
        own = [row for row in rows if row.quantity == quantity]
        judged = [row for row in own if not row.calibration]
        groups = _groups(judged) if quantity in ORDERED else {}
        pairs, tau = _order(groups.values())
        if own:
            found[quantity] = Verdict(
                quantity=quantity,
                errors=errors_of(judged),
                calibration=errors_of([row for row in own if row.calibration]),
                pairs=pairs,
                tau=tau,
                choices=tuple(_choice(name, group) for name, group in groups.items()),
            )
    return found


def errors_of(rows: Iterable[Comparison]) -> Errors | None:
    """Return the figures of the rows' errors; None of no rows."""
    errors = np.array([row.error for row in rows])
    if not errors.size:
        return None
    sizes = np.abs(errors)
    return Errors(
        rows=errors.size,
        median=float(np.median(sizes)),
        p95=float(np.percentile(sizes, 95)),
        max=float(sizes.max()),
        bias=float(np.median(errors)),
    )


def errors_by_place(rows: Iterable[Comparison]) -> dict[tuple[str, int, int], Errors]:
    """Return the errors of compute by (direction, rank, phase), without rows of a calibration; direction may be ""."""
    places = defaultdict(list)
    for row in rows:
        if row.rank is not None and row.phase is not None and not row.calibration:
            places[row.direction or "", row.rank, row.phase].append(row)
    found = {place: errors_of(own) for place, own in sorted(places.items())}
    return {place: errors for place, errors in found.items() if errors is not None}


def _groups(rows: Iterable[Comparison]) -> dict[str, list[Comparison]]:
    """Return the workloads that have several configurations. Only what one file holds is compared."""
    groups = defaultdict(list)
    for row in rows:
        if row.group is not None:
            groups[f"{row.source}: {row.group}"].append(row)
    return {name: own for name, own in groups.items() if len({row.configuration for row in own}) > 1}


def _order(groups: Iterable[Sequence[Comparison]]) -> tuple[int, float | None]:
    """Return how many pairs have an order, and Kendall's tau over them."""
    pairs, agreeing = 0, 0.0
    for rows in groups:
        measured = np.array([row.measured for row in rows])
        predicted = np.array([row.predicted for row in rows])
        spread = np.array([row.spread for row in rows])
        names = np.array([row.configuration for row in rows])
        gap = np.abs(measured[:, None] - measured) / np.minimum(measured[:, None], measured)
        apart = (gap > APART * np.maximum(spread[:, None], spread)) & (names[:, None] != names)
        apart = np.triu(apart, 1)
        signs = np.sign(measured[:, None] - measured) * np.sign(predicted[:, None] - predicted)
        pairs, agreeing = pairs + int(apart.sum()), agreeing + float(signs[apart].sum())
    return pairs, agreeing / pairs if pairs else None


def _choice(name: str, rows: Sequence[Comparison]) -> Choice:
    picked = min(rows, key=lambda row: (row.predicted, -row.measured))
    best = min(rows, key=lambda row: row.measured)
    return Choice(
        group=name,
        configurations=len({row.configuration for row in rows}),
        picked=picked.configuration,
        best=best.configuration,
        regret=picked.measured / best.measured - 1.0,
    )
