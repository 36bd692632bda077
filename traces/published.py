"""Published per-head settings, as the research code stores them: one JSON list of layers, each an object of heads.

A head is `["vertical_and_slash", columns, slashes, score]` (fixed budgets) or
`["flex_vertical_and_slash", [p, cap], [p, cap], score]` (smallest set of mass p, at most cap; columns, then slashes).
The score is what the publisher measured, larger is better; it is kept, not used.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from .errors import InputError, shortened, shown
from .files import read_json

MAX_PUBLISHED_BYTES = 16 << 20
MAX_PUBLISHED_VALUES = 1 << 20
MAX_LAYERS = MAX_HEADS = 4096
MAX_BUDGET_TOKENS = 1 << 30


@dataclass(frozen=True, kw_only=True)
class FixedBudget:
    """Fixed budgets of one head: so many token columns, so many slashes (token distances)."""

    columns: int
    slashes: int
    score: float


@dataclass(frozen=True, kw_only=True)
class FlexBudget:
    """Budgets by mass of one head: the smallest set that keeps this share of attention, at most the cap."""

    columns_mass: float
    columns_cap: int
    slashes_mass: float
    slashes_cap: int
    score: float


HeadBudget: TypeAlias = FixedBudget | FlexBudget


def read_published(
    path: Path | str, *, layers: int | None = None, heads: int | None = None
) -> tuple[tuple[HeadBudget, ...], ...]:
    """Return [layer][head] settings. InputError names file, layer, head and value.

    layers, heads: the model's; a file of another shape is refused. Without them any rectangular shape is taken.
    """
    source = Path(path)
    raw = read_json(source, max_bytes=MAX_PUBLISHED_BYTES, max_values=MAX_PUBLISHED_VALUES)
    if not isinstance(raw, list) or not raw:
        raise InputError("must be a non-empty list of layers", source=source)
    if len(raw) > MAX_LAYERS:
        raise InputError(f"has {len(raw)} layers; at most {MAX_LAYERS} are read", source=source, field="layers")
    if layers is not None and len(raw) != layers:
        raise InputError(f"has {len(raw)} layers, the model has {layers}", source=source, field="layers")
    count = heads if heads is not None else len(raw[0]) if isinstance(raw[0], dict) else 0
    return tuple(_read_layer(value, layer, count, source) for layer, value in enumerate(raw))


def _read_layer(value: Any, layer: int, heads: int, source: Path) -> tuple[HeadBudget, ...]:
    if not isinstance(value, dict):
        raise InputError("must be an object of heads", source=source, field=f"layer {layer}")
    if len(value) > MAX_HEADS:
        problem = f"has {len(value)} heads; at most {MAX_HEADS} are read"
        raise InputError(problem, source=source, field=f"layer {layer}")
    expected = [str(head) for head in range(heads)]
    if not value or sorted(value) != sorted(expected):
        stray = sorted(set(value) ^ set(expected))
        problem = f"must have heads 0 to {heads - 1}, differs in {shortened(', '.join(stray[:4]), 60) or 'all'}"
        raise InputError(problem, source=source, field=f"layer {layer}")
    found = []
    for head in expected:
        try:
            found.append(_read_head(value[head]))
        except InputError as error:
            raise InputError(str(error), source=source, field=f"layer {layer}, head {head}") from error
    return tuple(found)


def _read_head(value: Any) -> HeadBudget:
    if not isinstance(value, list) or len(value) != 4:
        raise InputError(f"must be [name, columns, slashes, score], not {shown(value)}")
    name, columns, slashes, score = value
    if name == "vertical_and_slash":
        budgets = {"columns": _budget(columns, "columns"), "slashes": _budget(slashes, "slashes")}
        return FixedBudget(**budgets, score=_number(score, "score"))
    if name != "flex_vertical_and_slash":
        raise InputError(f"pattern {shown(name)} is neither vertical_and_slash nor flex_vertical_and_slash")
    columns_mass, columns_cap = _mass_and_cap(columns, "columns")
    slashes_mass, slashes_cap = _mass_and_cap(slashes, "slashes")
    score = _number(score, "score")
    return FlexBudget(columns_mass=columns_mass, columns_cap=columns_cap, slashes_mass=slashes_mass,
                      slashes_cap=slashes_cap, score=score)  # fmt: skip


def _mass_and_cap(value: Any, name: str) -> tuple[float, int]:
    if not isinstance(value, list) or len(value) != 2:
        raise InputError(f"{name} must be [p, cap], not {shown(value)}")
    mass = _number(value[0], f"{name} p")
    if not 0.0 < mass <= 1.0:
        raise InputError(f"{name} p must be above 0 and at most 1, not {mass}")
    return mass, _budget(value[1], f"{name} cap")


def _budget(value: Any, name: str) -> int:
    if type(value) is not int or not 1 <= value <= MAX_BUDGET_TOKENS:
        raise InputError(f"{name} must be a whole number from 1, not {shown(value)}")
    return value


def _number(value: Any, name: str) -> float:
    if type(value) not in (int, float) or not math.isfinite(value):
        raise InputError(f"{name} must be a finite number, not {shown(value)}")
    return float(value)
