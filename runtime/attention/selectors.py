"""Selectors by name: from (name, settings), as a trace or a plan states them, to a choice on the device.

The mathematics is in `kernels.select.choose`; here are the settings, their checks and what is recorded of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from ...kernels.mask import AttentionMask
from ...kernels.select.choose import (
    ALONE,
    Collectives,
    FixedBudget,
    FlexBudget,
    HeadBudget,
    ShardTensors,
    VerticalSlashBudgets,
    choose_moba_block,
    choose_vertical_slash,
    choose_xattention,
    sink_window,
    vertical_slash_budgets,
)
from ...traces import published
from ...traces.errors import InputError

# selector -> its settings with what they are when not given (budgets and windows in tokens, masses as shares)
SETTINGS: dict[str, dict[str, int | float]] = {
    "vertical-slash": {"columns": 1024, "slashes": 1024, "sink_tokens": 30, "window_tokens": 100},
    "flex": {"column_mass": 0.9, "column_cap": 4096, "slash_mass": 0.9, "slash_cap": 4096},
    "xattention": {"stride": 16, "mass": 0.9},
    "moba-block": {"chunk_tokens": 512, "top_chunks": 8},
    "sink-window": {"sink_tokens": 30, "window_tokens": 1024},
}
MASSES = frozenset({"column_mass", "slash_mass", "mass"})
MAY_BE_ZERO = frozenset({"columns", "slashes", "sink_tokens", "window_tokens"})


@dataclass(frozen=True, kw_only=True)
class Selector:
    """How every layer's patterns are chosen. Build with `make_selector` or `published_selector`.

    name, settings: as recorded, when all heads share them
    budgets:        [layer][head] fixed or flex budgets, when heads differ (published settings); then name is
                    "published" and each head is recorded as the vertical-slash or flex that it is
    """

    name: str
    settings: Mapping[str, int | float]
    budgets: tuple[tuple[HeadBudget, ...], ...] | None = None

    def choose(
        self, shard: ShardTensors, *, layer: int, scale: float, collectives: Collectives = ALONE
    ) -> AttentionMask:
        """Return the mask of one layer, the same on every rank. InputError when shape and settings do not fit."""
        try:
            return self._choose(shard, layer, scale, collectives)
        except ValueError as error:
            raise InputError(str(error), field=f"selector {self.name}") from error

    def _choose(self, shard: ShardTensors, layer: int, scale: float, collectives: Collectives) -> AttentionMask:
        settings: dict[str, Any] = dict(self.settings)
        if self.name == "xattention":
            return choose_xattention(shard, scale=scale, collectives=collectives, **settings)
        if self.name == "moba-block":
            return choose_moba_block(shard, collectives=collectives, **settings)
        if self.name == "sink-window":
            return sink_window(
                heads=shard.heads,
                seq_len_tokens=shard.seq_len_tokens,
                block_size=shard.block_size,
                documents=shard.documents,
                device=shard.q.device,
                **settings,
            ).mask
        forced = {name: settings[name] for name in ("sink_tokens", "window_tokens") if name in settings}
        budgets = _budget_tensors(self.layer_budgets(layer, shard.heads), shard.seq_len_tokens, str(shard.q.device))
        return choose_vertical_slash(shard, budgets, scale=scale, collectives=collectives, **forced).mask

    def layer_budgets(self, layer: int, heads: int) -> tuple[HeadBudget, ...]:
        """Return one budget per head of a vertical-slash, flex or published selector."""
        if self.budgets is not None:
            return self.budgets[layer]
        settings: dict[str, Any] = dict(self.settings)
        if self.name == "flex":
            return (FlexBudget(**settings),) * heads
        return (FixedBudget(columns=settings["columns"], slashes=settings["slashes"]),) * heads

    def recorded(self, layer: int, heads: int) -> list[tuple[str, dict[str, int | float]]]:
        """Return (selector, settings) of each head of a layer, as a trace records them."""
        if self.budgets is None:
            return [(self.name, dict(self.settings))] * heads
        return [_recorded_budget(budget) for budget in self.budgets[layer]]


def make_selector(name: str, settings: Mapping[str, Any] | None = None) -> Selector:
    """Return a selector; settings that are not given have their defaults. InputError for names and values unknown."""
    if name not in SETTINGS:
        raise InputError(f"{name!r} is not one of {', '.join(SETTINGS)}", field="selector")
    given = {key: value for key, value in (settings or {}).items() if value is not None}
    for key, value in given.items():
        if key not in SETTINGS[name]:
            raise InputError(f"{name} has no such setting; it has {', '.join(SETTINGS[name])}", field=key)
        _check_setting(key, value)
    return Selector(name=name, settings={**SETTINGS[name], **given})


def published_selector(heads: Sequence[Sequence[published.HeadBudget]]) -> Selector:
    """Return the selector of published per-head settings ([layer][head], see `traces.published`)."""
    return Selector(
        name="published", settings={}, budgets=tuple(tuple(_budget(head) for head in layer) for layer in heads)
    )


def _budget(head: published.HeadBudget) -> HeadBudget:
    if isinstance(head, published.FixedBudget):
        return FixedBudget(columns=head.columns, slashes=head.slashes)
    return FlexBudget(
        column_mass=head.columns_mass,
        column_cap=head.columns_cap,
        slash_mass=head.slashes_mass,
        slash_cap=head.slashes_cap,
    )


def _recorded_budget(budget: HeadBudget) -> tuple[str, dict[str, int | float]]:
    if isinstance(budget, FlexBudget):
        return "flex", vars(budget).copy()
    defaults = SETTINGS["vertical-slash"]
    forced = {name: defaults[name] for name in ("sink_tokens", "window_tokens")}
    return "vertical-slash", vars(budget) | forced


def _check_setting(name: str, value: Any) -> None:
    if name in MASSES:
        if type(value) not in (int, float) or not 0 < value <= 1:
            raise InputError(f"must be above 0 and at most 1, not {value!r}", field=name)
        return
    lowest = 0 if name in MAY_BE_ZERO else 1
    if type(value) is not int or value < lowest:
        raise InputError(f"must be a whole number from {lowest}, not {value!r}", field=name)


@lru_cache(maxsize=256)
def _budget_tensors(heads: tuple[HeadBudget, ...], seq_len_tokens: int, device: str) -> VerticalSlashBudgets:
    # Kept: copying them to the device again in every layer would make it wait.
    return vertical_slash_budgets(heads, seq_len_tokens=seq_len_tokens, device=torch.device(device))
