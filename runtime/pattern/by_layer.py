"""Selectors that differ from layer to layer: made of a settings file's rules, named in a plan, asked by each layer."""

from __future__ import annotations

from dataclasses import dataclass

from ...kernels.mask import AttentionMask
from ...kernels.select.probe import ALONE, Collectives, ShardTensors
from ...kernels.select.registry import Selector
from ...kernels.select.sink_window import dense
from ...planner.specs import MAX_SEQ_LEN_TOKENS, MODEL, ModelShape, PatternSpec, SelectorSpec
from ...traces.errors import InputError
from .section import PatternSection, SelectorSection, parse_layers
from .selectors import lists_blocks, make_selector, pattern_chosen_by

DENSE = "dense"


@dataclass(frozen=True, kw_only=True)
class LayerSelectors(Selector):
    """A selector for each layer; a trace names each layer's own."""

    name, causal = "by layer", False
    help = "another selector in each layer"
    layers: tuple[Selector, ...]

    @property
    def most_columns(self) -> int:
        """The most of any layer."""
        return max(one.most_columns for one in self.layers)

    def of_layer(self, layer: int) -> Selector:
        """Return the layer's own."""
        return self.layers[layer]

    def of_head(self, layer: int, head: int) -> Selector:
        """Return the layer's own."""
        return self.layers[layer].of_head(layer, head)

    def choose(
        self, shard: ShardTensors, *, scale: float, layer: int = 0, collectives: Collectives = ALONE
    ) -> AttentionMask:
        """Return what the layer's own selector chooses."""
        return self.layers[layer].choose(shard, scale=scale, layer=layer, collectives=collectives)

    def _choose(self, shard: ShardTensors, *, scale: float, layer: int, collectives: Collectives) -> AttentionMask:
        return self.choose(shard, scale=scale, layer=layer, collectives=collectives)


def selector_by_rules(section: PatternSection, *, layers: int) -> Selector:
    """Return what chooses for a model of so many layers; InputError names the rule that does not fit."""
    rest = _of_section(section)
    if not section.layers:
        return rest
    made: list[Selector] = []
    for number, rule in enumerate(section.layers):
        try:
            made.append(_of_section(rule))
            beyond = [layer for layer in parse_layers(rule.layers) or () if layer >= layers]
        except InputError as error:
            raise type(error)(str(error), field=f"layers.{number}") from error
        if beyond:
            raise InputError(f"names layer {beyond[0]} of a model of {layers}", field=f"layers.{number}.layers")
    rules = list(zip(section.layers, made, strict=True))
    return LayerSelectors(
        layers=tuple(next((one for rule, one in rules if rule.names(layer)), rest) for layer in range(layers))
    )


def selectors_in(selector: Selector) -> tuple[Selector, ...]:
    """Return the selectors that one is made of: itself, or each layer's."""
    return selector.layers if isinstance(selector, LayerSelectors) else (selector,)


def pattern_of_selector(
    selector: Selector, model: ModelShape, *, seq_len_tokens: int, packed: bool = False
) -> PatternSpec:
    """Return the part of a plan that says: patterns are chosen anew, in this way, but where the model has its own.

    packed: for documents of their own.
    """
    if not isinstance(selector, LayerSelectors):
        return pattern_chosen_by(selector, packed=packed)
    by_layer = []
    for layer, one in enumerate(selector.layers):
        own = model.limits(layer, seq_len_tokens)
        by_layer.append(SelectorSpec(selector=MODEL if own else one.name, settings=own or one.settings))
    return PatternSpec(
        source="choose",
        by_layer=tuple(by_layer),
        listed=any(lists_blocks(one, packed=packed) for one in selector.layers),
    )


def planned_selector(pattern: PatternSpec, *, layers: int) -> Selector:
    """Return what a plan's pattern is chosen by, in a model of so many layers. InputError names what does not fit."""
    if pattern.by_layer is None:
        return make_selector(pattern.selector or "", pattern.settings)
    if len(pattern.by_layer) != layers:
        raise InputError(f"are of {len(pattern.by_layer)} layers, not of {layers}", field="pattern.by_layer")
    return LayerSelectors(layers=tuple(_made(number, one) for number, one in enumerate(pattern.by_layer)))


def selector_words(pattern: PatternSpec) -> str:
    """Return how a plan's patterns are chosen, in words."""
    if pattern.by_layer is None:
        return f"{pattern.selector} {pattern.settings}"
    runs: list[tuple[int, int, SelectorSpec]] = []
    for layer, one in enumerate(pattern.by_layer):
        if runs and runs[-1][2] == one:
            runs[-1] = (runs[-1][0], layer, one)
        else:
            runs.append((layer, layer, one))
    return "; ".join(f"layers {first}-{last}: {one.selector} {one.settings}" for first, last, one in runs)


def _of_section(section: SelectorSection) -> Selector:
    if section.selector != DENSE:
        return make_selector(section.selector, section.settings)
    for setting in section.settings:
        raise InputError("dense attention has no settings", field=setting)
    return dense(MAX_SEQ_LEN_TOKENS)


def _made(layer: int, spec: SelectorSpec) -> Selector:
    if spec.selector == MODEL:  # nobody asks it: the layer has a pattern of its own
        return dense(MAX_SEQ_LEN_TOKENS)
    try:
        return make_selector(spec.selector, spec.settings)
    except InputError as error:
        raise type(error)(str(error), field=f"pattern.by_layer.{layer}") from error
