"""Plans over NCCL on the GPUs of one host, in bf16, against float64: within twice plain torch's own bf16 error.

Run with: pytest -m gpu tests/runtime/attention/test_gpu_ring.py -v
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product

import pytest

from rank_pool import RankPool
from ring_cases import anchor_pattern
from sparsering.planner.layouts.collective import Collective
from sparsering.planner.layouts.gather import Gather
from sparsering.planner.layouts.hierarchical import Hierarchical
from sparsering.planner.layouts.layout import Layout
from sparsering.planner.layouts.ring import Ring
from sparsering.planner.layouts.two_level import TwoLevel
from sparsering.planner.layouts.ulysses import Ulysses
from sparsering.planner.plan import AttentionSpec, KernelSpec, ModelShape, PatternSpec, Plan, make_plan
from sparsering.planner.schedule.pairs import pattern_pairs
from sparsering.planner.schedule.placement import REGULAR_PLACEMENTS, balanced
from sparsering.planner.schedule.workload import unit_load
from sparsering.traces.pattern import LayerPattern

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(570)]

LAYOUTS = {
    2: [Ring(prefetch=1), Gather(chunks=1), Ulysses(degree=2)],
    4: [
        Ring(prefetch=2),
        Gather(chunks=2),
        Hierarchical(inner_size=2),
        TwoLevel(inner_size=2),
        TwoLevel(inner_size=2, halves=True),
        Ulysses(degree=2),
        Ulysses(degree=4),
    ],
    8: [
        Ring(prefetch=1),
        Ring(prefetch=3),
        Gather(chunks=3),
        Hierarchical(inner_size=4),
        TwoLevel(inner_size=4),
        TwoLevel(inner_size=4, halves=True),
        Ulysses(degree=2),
        Ulysses(degree=8),
    ],
}


@pytest.fixture(scope="module")
def gpu_pools() -> Iterator[Callable[[int, bool], RankPool]]:
    """NCCL process groups, one at a time: (world size, as two nodes)."""
    held: dict[tuple[int, bool], RankPool] = {}

    def pool_of(world_size: int, two_nodes: bool) -> RankPool:
        import torch

        if torch.cuda.device_count() < world_size:
            pytest.skip(f"needs {world_size} GPUs, this host has {torch.cuda.device_count()}")
        if (world_size, two_nodes) not in held:
            for pool in held.values():
                pool.close()
            held.clear()
            half = world_size // 2
            hosts = {rank: {"NCCL_HOSTID": f"node{rank // half}"} for rank in range(world_size)} if two_nodes else None
            held[world_size, two_nodes] = RankPool(world_size, device="cuda", environment=hosts)
        return held[world_size, two_nodes]

    yield pool_of
    for pool in held.values():
        pool.close()


def _plan(
    pattern: LayerPattern,
    world_size: int,
    placement: str,
    layout: Layout,
    granularity_tokens: int = 128,
    *,
    backend: str = "triton",
    leave_out: bool = False,
) -> Plan:
    common = {
        "seq_len_tokens": pattern.seq_len_tokens,
        "world_size": world_size,
        "granularity_tokens": granularity_tokens,
    }
    if placement == "balanced":
        padded = REGULAR_PLACEMENTS["striped"](**common).padded_tokens
        load = unit_load([pattern], granularity_tokens=128, padded_tokens=padded)
        chosen = balanced(unit_load=load, **common)
    else:
        chosen = REGULAR_PLACEMENTS[placement](**common)
    return make_plan(
        attention=AttentionSpec(
            model=ModelShape(layers=1, heads=16, kv_heads=2, head_dim=128),
            seq_len_tokens=pattern.seq_len_tokens,
            block_size=128,
            dtype="bfloat16",
            columns_capacity=-(-pattern.max_columns // 64) * 64,
        ),
        placement=chosen,
        forward=layout,
        pattern=PatternSpec(source="trace"),
        kernels=KernelSpec.model_validate({"backend": backend}),
        pairs=pattern_pairs(pattern, chosen) if leave_out else None,
    )


def _check(pool: RankPool, plan: Plan, pattern: LayerPattern) -> None:
    for rank, verdicts in enumerate(pool.run("verified", plan=plan, pattern=pattern, seed=11)):
        assert {verdict.name for verdict in verdicts} == {"out", "lse", "dq", "dk", "dv"}
        for verdict in verdicts:
            print(f"rank {rank} {verdict.name}: {verdict.error:.3e}, plain torch {verdict.plain_error:.3e}")
            assert verdict.ok, f"rank {rank}: {verdict} exceeds {verdict.tolerance}"


@pytest.mark.parametrize(
    ("world_size", "placement", "layout"),
    [(w, p, x) for w in LAYOUTS for p, x in product(("striped", "zigzag", "balanced"), LAYOUTS[w])],
    ids=str,
)
def test_bf16_over_nccl(
    world_size: int, placement: str, layout: Layout, gpu_pools: Callable[[int, bool], RankPool]
) -> None:
    pattern = anchor_pattern(seq_len_tokens=16384 - 77, density=0.1, columns=512)
    _check(gpu_pools(world_size, False), _plan(pattern, world_size, placement, layout), pattern)


@pytest.mark.parametrize("granularity_tokens", [256, 512])
@pytest.mark.parametrize("world_size", [4, 8])
def test_wider_stripes(world_size: int, granularity_tokens: int, gpu_pools: Callable[[int, bool], RankPool]) -> None:
    pattern = anchor_pattern(seq_len_tokens=16384 - 77, density=0.1, columns=512)
    plan = _plan(pattern, world_size, "striped", Gather(chunks=1), granularity_tokens=granularity_tokens)
    _check(gpu_pools(world_size, False), plan, pattern)


@pytest.mark.parametrize("pull", [False, True])
@pytest.mark.parametrize("backend", ["triton", "flash4"])
@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_gradients_written_rounded(
    world_size: int, backend: str, pull: bool, gpu_pools: Callable[[int, bool], RankPool]
) -> None:
    if backend == "flash4":
        pytest.importorskip("flash_attn.cute.interface", exc_type=ImportError)
    layout = Gather(chunks=1, narrow_gradients=True, pull=pull)
    pattern = anchor_pattern(seq_len_tokens=16384 - 77, density=0.1, columns=512)
    plan = _plan(pattern, world_size, "striped", layout, backend=backend)
    _check(gpu_pools(world_size, False), plan, pattern)


@pytest.mark.parametrize("layout", [Ring(prefetch=1), Gather(chunks=2)], ids=str)
@pytest.mark.parametrize("world_size", [4, 8])
def test_block_masks_and_documents(world_size: int, layout: Layout, gpu_pools: Callable[[int, bool], RankPool]) -> None:
    pattern = anchor_pattern(seq_len_tokens=16384, density=0.1, columns=128, documents=5, block_mask_heads=4)
    _check(gpu_pools(world_size, False), _plan(pattern, world_size, "balanced", layout), pattern)


@pytest.mark.parametrize(
    "layout",
    [
        Collective(),
        Gather(chunks=2, keep_kv=True),
        TwoLevel(inner_size=2, narrow_gradients=True),
    ],
    ids=str,
)
@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_other_transports_and_kept_keys(
    world_size: int, layout: Layout, gpu_pools: Callable[[int, bool], RankPool]
) -> None:
    pattern = anchor_pattern(seq_len_tokens=16384 - 77, density=0.1, columns=512)
    _check(gpu_pools(world_size, False), _plan(pattern, world_size, "striped", layout), pattern)


PULLING = [Gather(chunks=1, pull=True), Gather(chunks=2, keep_kv=True, pull=True)]


@pytest.mark.parametrize("layout", PULLING, ids=str)
@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_pulls_by_copy_engines(world_size: int, layout: Layout, gpu_pools: Callable[[int, bool], RankPool]) -> None:
    """Twice over the same channels: signals of one plan must not be left for the next."""
    pattern = anchor_pattern(seq_len_tokens=16384 - 77, density=0.1, columns=512)
    for placement in ("striped", "zigzag"):
        _check(gpu_pools(world_size, False), _plan(pattern, world_size, placement, layout), pattern)


@pytest.mark.parametrize("layout", [Ring(prefetch=1), Gather(chunks=1), *PULLING], ids=str)
@pytest.mark.parametrize("world_size", [4, 8])
def test_pairs_that_documents_never_need_are_left_out(
    world_size: int, layout: Layout, gpu_pools: Callable[[int, bool], RankPool]
) -> None:
    """Ranks have different numbers of calls then, which those that pull must not wait for."""
    pattern = anchor_pattern(seq_len_tokens=16384, density=0.3, columns=64, documents=9)
    plan = _plan(pattern, world_size, "contiguous", layout, leave_out=True)
    assert plan.active_pairs().left_out()
    _check(gpu_pools(world_size, False), plan, pattern)


@pytest.mark.parametrize("layout", [Ring(prefetch=1), Gather(chunks=1)], ids=str)
@pytest.mark.parametrize("world_size", [4, 8])
def test_flash4_plays_the_same_schedules(
    world_size: int, layout: Layout, gpu_pools: Callable[[int, bool], RankPool]
) -> None:
    pytest.importorskip("flash_attn.cute", reason="flash-attn-4 is not installed")
    pattern = anchor_pattern(seq_len_tokens=16384 - 77, density=0.1, columns=512)
    _check(gpu_pools(world_size, False), _plan(pattern, world_size, "striped", layout, backend="flash4"), pattern)


@pytest.mark.parametrize(("world_size", "layout"), [(w, x) for w in (4, 8) for x in LAYOUTS[w][-5:]], ids=str)
def test_long_sequence(world_size: int, layout: Layout, gpu_pools: Callable[[int, bool], RankPool]) -> None:
    pattern = anchor_pattern(seq_len_tokens=131072, density=0.05, columns=1024)
    _check(gpu_pools(world_size, False), _plan(pattern, world_size, "striped", layout), pattern)


@pytest.mark.parametrize(("world_size", "layout"), [(w, x) for w in (4, 8) for x in LAYOUTS[w]], ids=str)
def test_two_nodes(world_size: int, layout: Layout, gpu_pools: Callable[[int, bool], RankPool]) -> None:
    pattern = anchor_pattern(seq_len_tokens=32768, density=0.1, columns=512)
    _check(gpu_pools(world_size, True), _plan(pattern, world_size, "striped", layout), pattern)
