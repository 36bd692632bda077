"""Selectors where a user's words come in: by name and settings, or as published per head; mistakes are InputErrors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from ...kernels.mask import AttentionMask
from ...kernels.select.probe import ALONE, Collectives, ShardTensors
from ...kernels.select.registry import Selector, selector_of, selectors
from ...kernels.select.sink_window import dense
from ...kernels.select.vertical_slash import (
    FixedVerticalSlash,
    FlexVerticalSlash,
    VerticalSlashSelector,
    choose_by_head,
)
from ...planner.plan import PatternSpec
from ...traces import published
from ...traces.errors import InputError, did_you_mean, unknown_name


def make_selector(name: str, settings: Mapping[str, Any] | None = None) -> Selector:
    """Return a selector; settings that are not given have their defaults. InputError for names and values unknown."""
    known, settings = selectors(), settings or {}
    if name not in known:
        raise unknown_name(name, known, field="selector")
    names = [one.name for one in fields(known[name])]
    for setting in settings:
        if setting not in names:
            told = f"{name} has no such setting; it has {', '.join(names)}{did_you_mean(setting, names)}"
            raise InputError(told, field=setting)
    try:
        return selector_of(name, settings)
    except ValueError as error:
        raise InputError(str(error)) from error


def chosen_mask(
    selector: Selector, shard: ShardTensors, *, layer: int, scale: float, collectives: Collectives = ALONE
) -> AttentionMask:
    """Return `selector.choose`'s mask. InputError when shape and settings do not fit."""
    try:
        return selector.choose(shard, layer=layer, scale=scale, collectives=collectives)
    except ValueError as error:
        raise InputError(str(error), field=f"selector {selector.name}") from error


def pattern_chosen_by(selector: Selector, *, packed: bool = False) -> PatternSpec:
    """Return the part of a plan that says: patterns are chosen anew, by this selector. packed: for documents."""
    listed = lists_blocks(selector, packed=packed)
    return PatternSpec(source="choose", selector=selector.name, settings=selector.settings, listed=listed)


def lists_blocks(selector: Selector, *, packed: bool) -> bool:
    """Whether a selector's masks list their blocks one by one. packed: of documents."""
    return selector.listed or (packed and selector.lists_documents)


def dense_pattern(seq_len_tokens: int) -> PatternSpec:
    """Return the part of a plan that says: every token sees all before it."""
    return pattern_chosen_by(dense(seq_len_tokens))


@dataclass(frozen=True, kw_only=True)
class PublishedSettings(Selector):
    """Settings that differ from head to head, [layer][head]; a trace names each head's own. No plan can name it."""

    name, causal, keeps_documents, lists_documents = "published", False, True, True
    help = "vertical-slash with settings of every head"
    layers: tuple[tuple[VerticalSlashSelector, ...], ...]

    def of_head(self, layer: int, head: int) -> Selector:
        """Return the vertical-slash or flex selector that this head has."""
        return self.layers[layer][head]

    def _choose(self, shard: ShardTensors, *, scale: float, layer: int, collectives: Collectives) -> AttentionMask:
        budgets = [head.budget for head in self.layers[layer]]
        return choose_by_head(shard, budgets, scale=scale, collectives=collectives)


def published_selector(heads: Sequence[Sequence[published.HeadBudget]]) -> PublishedSettings:
    """Return the selector of published per-head settings ([layer][head], see `traces.published`)."""
    return PublishedSettings(layers=tuple(tuple(_of_budget(head) for head in layer) for layer in heads))


def _of_budget(head: published.HeadBudget) -> VerticalSlashSelector:
    if isinstance(head, published.FixedBudget):
        return FixedVerticalSlash(columns=head.columns, slashes=head.slashes)
    return FlexVerticalSlash(
        column_mass=head.columns_mass, column_cap=head.columns_cap, slash_mass=head.slashes_mass,
        slash_cap=head.slashes_cap,
    )  # fmt: skip
