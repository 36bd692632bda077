"""Layers as CUDA graphs over NCCL: the same bits as kernel by kernel, in every family of masks and selector."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from rank_pool import RankPool, gpu_ranks
from ring_cases import anchor_pattern
from sparsering.planner.layouts.gather import Gather
from sparsering.planner.layouts.layout import Layout
from sparsering.planner.layouts.ring import Ring
from sparsering.planner.plan import AttentionSpec, KernelSpec, ModelShape, PatternSpec, Plan, make_plan
from sparsering.planner.schedule.placement import REGULAR_PLACEMENTS
from sparsering.runtime.attention.graphs.graphs import EAGER_CALLS
from sparsering.runtime.pattern.selectors import make_selector, pattern_chosen_by
from sparsering.traces.pattern import LayerPattern, windowed

pytestmark = pytest.mark.gpu
TOKENS, LAYERS = 16384, EAGER_CALLS + 4


@pytest.fixture(scope="module", params=[1, 2])
def ranks(request: pytest.FixtureRequest) -> Iterator[RankPool]:
    with gpu_ranks(request.param) as pool:
        yield pool


def _plan(world_size: int, layout: Layout, pattern: PatternSpec, columns_capacity: int) -> Plan:
    striped = REGULAR_PLACEMENTS["striped"]
    return make_plan(
        attention=AttentionSpec(
            model=ModelShape(layers=LAYERS, heads=9, kv_heads=3, head_dim=64), seq_len_tokens=TOKENS, block_size=128,
            dtype="bfloat16", columns_capacity=columns_capacity,
        ),
        placement=striped(seq_len_tokens=TOKENS, world_size=world_size, granularity_tokens=128),
        forward=layout if world_size > 1 else Ring(prefetch=1), pattern=pattern, kernels=KernelSpec(backend="triton"),
    )  # fmt: skip


def _nine(pattern: LayerPattern) -> LayerPattern:
    return replace(pattern, heads=(pattern.heads * 2)[:9])


FAMILIES: dict[str, Callable[[int], LayerPattern]] = {
    "slashes": lambda n: anchor_pattern(seq_len_tokens=TOKENS, density=0.05 * (n + 1), columns=256),
    "blocks": lambda n: anchor_pattern(seq_len_tokens=TOKENS, density=0.05 * (n + 1), columns=0, block_mask_heads=16),
    "documents": lambda n: anchor_pattern(seq_len_tokens=TOKENS, density=0.2, columns=128, documents=3 + n),
    "windows": lambda n: _windows(n),
}


def _windows(number: int) -> LayerPattern:
    head = windowed(1000, block_size=128, blocks=TOKENS // 128, columns=range(number, 200), diagonals=[20 + number])
    return LayerPattern(seq_len_tokens=TOKENS, block_size=128, heads=(head,) * 9)


@pytest.mark.parametrize("layout", [Ring(prefetch=1), Gather(chunks=1, keep_kv=True)], ids=str)
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_masks(family: str, layout: Layout, ranks: RankPool) -> None:
    patterns = [_nine(FAMILIES[family](layer % 3)) for layer in range(LAYERS)]
    capacity = -(-max(pattern.max_columns for pattern in patterns) // 64) * 64
    plan = _plan(ranks.world_size, layout, PatternSpec(source="trace"), capacity)
    sinks = tuple(0.1 * head for head in range(9)) if family == "slashes" else None
    for result in ranks.run("graph_jobs.layers_recorded", plan=plan, patterns=patterns, sinks=sinks):
        assert all(result.same.values()), [name for name, same in result.same.items() if not same]
        assert result.recorded >= 2


@pytest.mark.parametrize("selector", ["xattention", "block-mass", "moba-block", "vertical-slash", "sink-window"])
def test_choices(selector: str, ranks: RankPool) -> None:
    capacity = {"vertical-slash": 1024, "sink-window": 64}.get(selector, 0)
    plan = _plan(ranks.world_size, Ring(prefetch=1), pattern_chosen_by(make_selector(selector)), capacity)
    for result in ranks.run("graph_jobs.layers_recorded", plan=plan, patterns=[None] * LAYERS):
        assert all(result.same.values()), [name for name, same in result.same.items() if not same]
        assert result.recorded == 3


def test_pauses_and_other_memory(ranks: RankPool) -> None:
    plan = _plan(ranks.world_size, Ring(prefetch=1), PatternSpec(source="trace"), 256)
    pattern = _nine(FAMILIES["slashes"](0))
    for changes in ({"paused_layers": (0, 4)}, {"larger_after": 4}):
        patterns = [pattern] * (LAYERS + 3)
        for result in ranks.run("graph_jobs.layers_recorded", plan=plan, patterns=patterns, **changes):
            assert all(result.same.values()), [name for name, same in result.same.items() if not same]
