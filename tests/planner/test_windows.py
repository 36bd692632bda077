"""Sliding windows in plans: what traces pass on, what is refused, and that older plans keep their digests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tiny
from sparsering.planner.cost.cluster import load_cluster
from sparsering.planner.layouts.ring import Ring
from sparsering.planner.plan import (
    AttentionSpec,
    KernelSpec,
    ModelShape,
    PatternSpec,
    Plan,
    load_plan,
    make_plan,
)
from sparsering.planner.replay import find_trace
from sparsering.planner.schedule.backends import require_elements
from sparsering.planner.schedule.pairs import pattern_pairs
from sparsering.planner.schedule.placement import REGULAR_PLACEMENTS, striped
from sparsering.planner.schedule.workload import workload
from sparsering.planner.search.problem import SearchSpace
from sparsering.planner.search.search import plan_trace
from sparsering.traces.dataset import manifest
from sparsering.traces.dataset.store import Trace
from sparsering.traces.dataset.writer import TraceWriter
from sparsering.traces.errors import InputError, UnsupportedError
from sparsering.traces.pattern import LayerPattern, element_mask, windowed

SHAPE: dict[str, Any] = {"layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 64}
CHOICE = tiny.CHOICE
PLANNED = "layers=2 heads=4 kv_heads=2 head_dim=64"
MODEL_TOLD = f"model: the plan is for {PLANNED} windows=(200, 300), not for {PLANNED} softcap=50.0"


def plan(*, backend: str = "triton", windowed: bool = False, **limits: Any) -> Plan:
    return make_plan(
        attention=AttentionSpec(
            model=ModelShape(**SHAPE, **limits), seq_len_tokens=512, block_size=128, dtype="bfloat16",
            columns_capacity=0,
        ),
        placement=striped(seq_len_tokens=512, world_size=2, granularity_tokens=128),
        forward=Ring(prefetch=1),
        pattern=PatternSpec(source="trace", windowed=windowed),
        kernels=KernelSpec(backend=backend),
    )  # fmt: skip


def trace_of(folder: Path, of_layers: list[int], **limits: Any) -> Trace:
    """A trace of one layer for each window, four heads of 128-token blocks."""
    model = manifest.ModelShape(model_id="tiny", layers=len(of_layers), heads=4, kv_heads=2, head_dim=64, **limits)
    header = tiny.trace_header(
        model=model, recorded_layers=tuple(range(len(of_layers))), seq_len_tokens=2000, block_size=128
    )
    heads = [windowed(tokens, block_size=128, blocks=16, diagonals=[0, 5]) for tokens in of_layers]
    layers = [LayerPattern(seq_len_tokens=2000, block_size=128, heads=(head,) * 4) for head in heads]
    with TraceWriter(folder, header) as writer:
        writer.append(0, {number: (layer, [CHOICE] * 4) for number, layer in enumerate(layers)})
    return Trace.open(folder)


def test_a_plan_from_before_windows_is_the_same_plan(golden: Path, tmp_path: Path) -> None:
    path = golden / "plan-version-1.json"
    found, document = load_plan(path), json.loads(path.read_text())
    assert found.digest == found.compute_digest() == document["digest"]
    assert found.pattern.windowed is False and found.model.windows is None
    found.save(tmp_path / "again.json")
    assert json.loads((tmp_path / "again.json").read_text()) == document
    assert find_trace(found, path, golden / "trace-version-1").steps == (0, 5)


def test_a_plan_with_windows_comes_back(tmp_path: Path) -> None:
    made = plan(windowed=True, windows=(200, 0), chunks=(0, 256))
    made.save(tmp_path / "plan.json")
    found = load_plan(tmp_path / "plan.json")
    assert found == made and found.model.windows == (200, 0) and found.model.chunks == (0, 256)
    assert len({one.digest for one in (made, plan(), plan(windowed=True), plan(windows=(200, 0)))}) == 4
    assert plan(windows=(0, 0), chunks=(0, 0)).digest == plan().digest


@pytest.mark.parametrize(
    ("limits", "told"),
    [
        ({"windows": [1, 2, 3]}, "model: windows are of 3 layers, not of 2"),
        ({"chunks": [1]}, "model: chunks are of 1 layers, not of 2"),
        ({"windows": [1, -2]}, "model.windows.1: Input should be greater than or equal to 0, not -2"),
        ({"windows": "many"}, "model.windows: "),
    ],
)
def test_limits_that_cannot_be(tmp_path: Path, limits: dict[str, Any], told: str) -> None:
    path = tmp_path / "plan.json"
    plan().save(path)
    document = json.loads(path.read_text())
    document["model"] |= limits
    path.write_text(json.dumps(document))
    with pytest.raises(InputError) as caught:
        load_plan(path)
    assert str(caught.value).startswith(f"{path}: {told}") and "\n" not in str(caught.value)


def test_another_model_is_refused_in_words() -> None:
    made = plan(windows=(200, 300))
    made.require(model=ModelShape(**SHAPE, windows=(200, 300)))
    for limits, told in (
        ({"windows": (200, 0)}, "model.windows: the plan is for 300 tokens in layer 1, not for 0"),
        ({}, "model.windows: the plan is for 200 tokens in layer 0, not for 0"),
        ({"softcap": 50.0}, MODEL_TOLD),
        ({"windows": (200, 300), "chunks": (7, 0)}, "model.chunks: the plan is for 0 tokens in layer 0, not for 7"),
    ):
        with pytest.raises(InputError) as caught:
            made.require(model=ModelShape.model_validate(SHAPE | limits))
        assert str(caught.value) == told
    with pytest.raises(InputError) as caught:
        plan().require(model=ModelShape.model_validate(SHAPE | {"layers": 3}))
    assert str(caught.value) == f"model: the plan is for {PLANNED}, not for {PLANNED.replace('2', '3', 1)}"


def test_kernels_that_know_whole_blocks_alone_are_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"^pattern.windowed: True is not what flash4 kernels take"):
        plan(backend="flash4", windowed=True)
    for backend in ("triton", "blockwise", "reference", "fastest"):
        assert plan(backend=backend, windowed=True).pattern.windowed
    assert not plan(backend="flash4").pattern.windowed
    with pytest.raises(InputError, match="backend"):
        require_elements("flash5", field="pattern.windowed", value=True)
    asked: list[tuple[dict[str, Any], str]] = [
        ({"windows": (0, 200)}, "model.windows: 200"), ({"softcap": 30.0}, "model.softcap: 30.0"),
    ]  # fmt: skip
    for limits, told in asked:
        with pytest.raises(UnsupportedError, match=f"^{told} is not what flash4 kernels take"):
            plan(backend="flash4", **limits)
        assert plan(backend="fastest", **limits).asked_of_elements()
    assert not plan(backend="flash4", windows=(0, 1 << 20)).asked_of_elements()


@pytest.mark.parametrize(
    ("of_layers", "limits", "expected"),
    [
        ([0, 0], {}, False),
        ([0, 300], {}, True),
        ([0, 0], {"windows": (300, 0), "chunks": (0, 512), "softcap": 50.0}, True),
        ([0, 0], {"windows": (2000, 4096)}, False),
    ],
)
@pytest.mark.parametrize("source", ["trace", "choose"])
def test_plans_know_the_windows_of_traces(
    tmp_path: Path, of_layers: list[int], limits: dict[str, Any], expected: bool, source: str
) -> None:
    """Those of layers that were not sampled as well, and the model's own that are shorter than the sequence."""
    trace = trace_of(tmp_path / "trace", of_layers, **limits)
    if source == "choose":
        real = trace.header.model_copy(update={"origin": "real", "audit_sha256": "ab" * 32})
        trace = Trace(trace.folder, trace.manifest.model_copy(update={"header": real}))
    space = SearchSpace(pattern=source, layers=(0,))
    made = plan_trace(trace, load_cluster("local-cpu-4"), space)
    assert made.pattern.windowed is expected
    assert made.model == ModelShape(**SHAPE, **limits)


def test_a_search_for_kernels_without_windows_is_refused_before_it(tmp_path: Path) -> None:
    trace = trace_of(tmp_path / "trace", [0, 300])
    space = SearchSpace(kernels=KernelSpec(backend="flash4"))
    with pytest.raises(UnsupportedError, match=r"^pattern.windowed: True is not what flash4"):
        plan_trace(trace, load_cluster("h100-nvlink-8"), space)


@given(st.integers(1, 60), st.integers(0, 70), st.integers(1, 4), st.sampled_from(sorted(REGULAR_PLACEMENTS)))
def test_pairs_and_work_hold_all_that_a_window_reaches(tokens: int, size: int, world: int, name: str) -> None:
    """Cut blocks are counted whole: a tile pair that attends anything is work, in a pair of shards that is computed."""
    head = windowed(size, block_size=4, blocks=-(-tokens // 4))
    pattern = LayerPattern(seq_len_tokens=tokens, block_size=4, heads=(head,))
    placement = REGULAR_PLACEMENTS[name](seq_len_tokens=tokens, world_size=world, granularity_tokens=4)
    pairs, counted, mask = pattern_pairs(pattern, placement), workload(pattern, placement), element_mask(pattern, 0)
    owned = [placement.valid_positions(rank) for rank in range(world)]
    for query in range(world):
        for key in range(world):
            attended = np.argwhere(mask[np.ix_(owned[query], owned[key])])
            if len(attended):
                assert pairs.matrix[query, key]
            tiles = {(int(owned[query][i]) // 4, int(owned[key][j]) // 4) for i, j in attended}
            assert counted.active[query, key, 0] >= len(tiles)
    assert int(counted.active.sum()) == head.count_active_blocks(pattern.num_blocks)
