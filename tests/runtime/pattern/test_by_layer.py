"""Patterns by layer: rules of a settings file, plans that name a selector a layer, and what does not fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sparsering.kernels.select.probe import ShardTensors
from sparsering.planner.layouts.ring import Ring
from sparsering.planner.plan import AttentionSpec, KernelSpec, ModelShape, make_plan
from sparsering.planner.schedule.placement import striped
from sparsering.planner.specs import PatternSpec, SelectorSpec
from sparsering.runtime.pattern.by_layer import (
    LayerSelectors,
    pattern_of_selector,
    planned_selector,
    selector_by_rules,
    selector_words,
    selectors_in,
)
from sparsering.runtime.pattern.section import PatternSection, read_patterns
from sparsering.traces.errors import InputError

MODEL_SHAPE = ModelShape(layers=7, heads=4, kv_heads=2, head_dim=16)
EXAMPLES = sorted(Path(__file__).parents[3].glob("examples/patterns/*.yaml"))
ONE_FOR_ALL = {"shared-anchor": "anchor", "shifted-groups": "shifted-groups"}
RULES = {
    "selector": "moba-block", "settings": {"top_chunks": 2},
    "layers": [
        {"layers": "0,5", "selector": "dense"},
        {"every": 3, "selector": "sink-window", "settings": {"window_tokens": 64, "sink_tokens": 4}},
    ],
}  # fmt: skip


def _names(section: dict, layers: int) -> list[str]:
    selector = selector_by_rules(PatternSection.model_validate(section), layers=layers)
    return [selector.of_head(layer, 0).name for layer in range(layers)]


def test_the_first_rule_that_names_a_layer_counts() -> None:
    window, rest = "sink-window", "moba-block"
    assert _names(RULES, 7) == [window, rest, rest, window, rest, window, window]
    selector = selector_by_rules(PatternSection.model_validate(RULES), layers=7)
    shown = [one.settings.get("window_tokens") for one in selectors_in(selector)]
    assert shown[0] == shown[5] != 64  # dense
    assert shown[3] == shown[6] == 64
    assert selector.most_columns == 4


def test_a_plan_names_each_layers_selector_and_gives_it_back() -> None:
    selector = selector_by_rules(PatternSection.model_validate(RULES), layers=7)
    spec = pattern_of_selector(selector, MODEL_SHAPE, seq_len_tokens=1024)
    assert spec.listed
    assert spec.by_layer is not None
    again = planned_selector(PatternSpec.model_validate_json(spec.model_dump_json()), layers=7)
    assert again == selector
    assert "layers 1-2: moba-block" in selector_words(spec)
    with pytest.raises(InputError, match=r"pattern\.by_layer: are of 7 layers, not of 6"):
        planned_selector(spec, layers=6)


def test_a_plan_says_which_layers_have_a_pattern_of_their_own() -> None:
    model = MODEL_SHAPE.model_copy(update={"windows": (0, 64, 0, 0, 2048, 0, 0), "chunks": (0, 0, 128, 0, 0, 0, 0)})
    selector = selector_by_rules(PatternSection.model_validate(RULES), layers=7)
    by_layer = pattern_of_selector(selector, model, seq_len_tokens=1024).by_layer
    assert by_layer is not None
    own = {layer: one.settings for layer, one in enumerate(by_layer) if one.selector == "model"}
    assert own == {1: {"window_tokens": 64}, 2: {"chunk_tokens": 128}}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"by_layer": 6}, "are of 6 layers, not of 7"),
        ({"layer": 1, "selector": "dense"}, r"by_layer\.1: is dense"),
        ({"layer": 0, "selector": "model"}, r"by_layer\.0: is model {}; the model itself limits the layer to nothing"),
        ({"layer": 1, "selector": "model", "settings": {"window_tokens": 65}}, r"by_layer\.1: is model"),
    ],
)
def test_a_plan_that_says_otherwise_is_refused(changes: dict, told: str) -> None:
    model = MODEL_SHAPE.model_copy(update={"windows": (0, 64, 0, 0, 0, 0, 0)})
    selector = selector_by_rules(PatternSection.model_validate(RULES), layers=7)
    spec = pattern_of_selector(selector, model, seq_len_tokens=1024)
    rows = list(spec.by_layer or ())[: changes.get("by_layer")]
    if "layer" in changes:
        rows[changes["layer"]] = SelectorSpec(selector=changes["selector"], settings=changes.get("settings", {}))
    for by_layer, refusal in ((spec.by_layer, None), (tuple(rows), told)):
        given = {
            "attention": AttentionSpec(model=model, seq_len_tokens=1024, block_size=64, dtype="float32",
                                       columns_capacity=64),
            "placement": striped(seq_len_tokens=1024, world_size=2, granularity_tokens=64), "forward": Ring(),
            "pattern": spec.model_copy(update={"by_layer": by_layer}), "kernels": KernelSpec(backend="blockwise"),
        }  # fmt: skip
        if refusal is None:
            assert make_plan(**given).pattern.by_layer == by_layer
            continue
        with pytest.raises(InputError, match=refusal):
            make_plan(**given)


@pytest.mark.parametrize("beside", [{"selector": "flex"}, {"settings": {"mass": 1}}, {"source": "trace"}])
def test_patterns_by_layer_stand_alone(beside: dict) -> None:
    with pytest.raises(ValueError, match="by_layer stands beside another way"):
        PatternSpec.model_validate({"source": "choose", "by_layer": [{"selector": "flex"}]} | beside)


def test_each_layer_is_chosen_for_by_its_own() -> None:
    selector = selector_by_rules(PatternSection.model_validate(RULES), layers=7)
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 1024, 2, 16, generator=generator) for _ in range(2))
    shard = ShardTensors.whole(q, k, block_size=64)
    for layer in range(7):
        mask = selector.choose(shard, scale=0.25, layer=layer)
        alone = selector.of_head(layer, 0).choose(shard, scale=0.25, layer=layer)
        assert torch.equal(mask.active, alone.active)
    assert selector.choose(shard, scale=0.25, layer=0).active.all()


def test_a_plan_without_layers_is_written_as_before() -> None:
    spec = PatternSpec(source="choose", selector="xattention", settings={"mass": 0.5})
    assert set(spec.model_dump()) == {"source", "selector", "settings", "trace_sha256", "listed"}
    assert not isinstance(planned_selector(spec, layers=3), LayerSelectors)


def test_a_layer_with_a_pattern_of_its_own_is_asked_for_nothing() -> None:
    by_layer = (SelectorSpec(selector="model"), SelectorSpec(selector="xattention"))
    selector = planned_selector(PatternSpec(source="choose", by_layer=by_layer), layers=2)
    assert [one.name for one in selectors_in(selector)] == ["sink-window", "xattention"]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_the_examples_are_read(path: Path) -> None:
    selector = selector_by_rules(read_patterns(path), layers=36)
    names = {one.name for one in selectors_in(selector)}
    if path.stem in ONE_FOR_ALL:
        assert names == {ONE_FOR_ALL[path.stem]}
        return
    assert len({one.settings.get("window_tokens") for one in selectors_in(selector)}) == 2


def test_there_are_examples() -> None:
    assert len(EXAMPLES) == 3 + len(ONE_FOR_ALL)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("selector: xatention", "selector: 'xatention'"),
        ("layers: [{layers: '0,99', selector: dense}]", "layers.0.layers: names layer 99 of a model of 4"),
        ("layers: [{layers: 'a', selector: dense}]", "layers.0: .*'a' is neither a layer nor a range"),
        ("layers: [{every: 0, selector: dense}]", "layers.0.every: "),
        ("layers: [{selector: dense, settings: {mass: 1}}]", "layers.0: mass: dense attention has no settings"),
        ("layers: [{selector: xattention, settings: {mas: 1}}]", "layers.0: .*no such setting"),
        ("layer: []", "layer: unknown key"),
    ],
)
def test_settings_that_do_not_fit_are_one_line(text: str, told: str, tmp_path: Path) -> None:
    path = tmp_path / "patterns.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=told) as caught:
        selector_by_rules(read_patterns(path), layers=4)
    assert "\n" not in str(caught.value)
