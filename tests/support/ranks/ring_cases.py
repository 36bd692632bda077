"""The matrix of distributed cases: patterns × placements × layouts, and what the reference says of each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import torch

from dense_definition import Attended, Inputs, attend
from rank_jobs import global_tensors
from sparsering.kernels.plain.reference import reference_attention, reference_gradients
from sparsering.planner.layouts.collective import Collective
from sparsering.planner.layouts.gather import Gather
from sparsering.planner.layouts.hierarchical import Hierarchical
from sparsering.planner.layouts.layout import Layout
from sparsering.planner.layouts.ring import Ring
from sparsering.planner.layouts.two_level import TwoLevel
from sparsering.planner.layouts.ulysses import Ulysses
from sparsering.planner.plan import AttentionSpec, KernelSpec, ModelShape, PatternSpec, Plan, make_plan
from sparsering.planner.schedule.pairs import pattern_pairs
from sparsering.planner.schedule.placement import REGULAR_PLACEMENTS, Placement, balanced
from sparsering.planner.schedule.workload import unit_load
from sparsering.runtime.attention.masks import mask_of
from sparsering.traces.pattern import BlockMask, HeadPattern, LayerPattern, VerticalSlash, windowed


@dataclass(frozen=True, kw_only=True)
class PatternCase:
    """A pattern, the K/V heads it runs with, and a softcap and learned sinks of its scores."""

    pattern: LayerPattern
    kv_heads: int
    softcap: float | None = None
    sinks: tuple[float, ...] | None = None

    @property
    def form(self) -> dict[str, Any]:
        """The latter two as jobs of ranks take them."""
        return {"softcap": self.softcap, "sinks": self.sinks}

    def mutated(self) -> LayerPattern:
        """Return the pattern with its last head made local."""
        local = VerticalSlash(columns=np.zeros(0, np.int32), diagonals=np.array([0]))
        return replace(self.pattern, heads=(*self.pattern.heads[:-1], local))


@dataclass(frozen=True, kw_only=True)
class Case:
    """One plan to run."""

    world_size: int
    placement: str
    granularity_tokens: int
    layout: Layout
    pattern: str

    def __str__(self) -> str:
        placed = f"{self.placement}{self.granularity_tokens}"
        return f"{self.pattern}-W{self.world_size}-{placed}-{self.layout.text}"


def _slash(columns: list[int], diagonals: list[int]) -> VerticalSlash:
    return VerticalSlash(columns=np.array(columns, dtype=np.int32), diagonals=np.array(diagonals, dtype=np.int32))


def _random_blocks(blocks: int, share: float, seed: int, *, columns: Sequence[int] = ()) -> BlockMask:
    chosen = np.tril(np.random.default_rng(seed).random((blocks, blocks)) < share)
    return BlockMask(bits=chosen | np.eye(blocks, dtype=bool), columns=columns)


def anchor_pattern(
    *,
    seq_len_tokens: int,
    density: float,
    columns: int,
    heads: int = 16,
    block_size: int = 128,
    documents: int = 0,
    block_mask_heads: int = 0,
    seed: int = 0,
) -> LayerPattern:
    """Return local and far diagonals of about `density` and random columns; the last heads are block masks."""
    generator = np.random.default_rng(seed)
    blocks = -(-seq_len_tokens // block_size)
    local, far = max(1, int(blocks * density * 0.3)), int(blocks * density * 0.35)
    made: list[HeadPattern] = []
    for head in range(heads):
        if head >= heads - block_mask_heads:
            made.append(_random_blocks(blocks, density, seed + head))
            continue
        slashes = np.union1d(np.arange(local), generator.permutation(blocks)[:far])
        diagonals = np.union1d(slashes, slashes + 1)
        chosen = np.sort(generator.permutation(seq_len_tokens)[:columns])
        made.append(
            VerticalSlash(columns=chosen.astype(np.int32), diagonals=diagonals[diagonals < blocks].astype(np.int32))
        )
    cuts = np.sort(generator.permutation(seq_len_tokens)[: max(documents - 1, 0)])
    ids = np.searchsorted(cuts, np.arange(seq_len_tokens), side="right").astype(np.int32) if documents else None
    return LayerPattern(seq_len_tokens=seq_len_tokens, block_size=block_size, heads=tuple(made), documents=ids)


def _patterns() -> dict[str, PatternCase]:
    gqa: tuple[HeadPattern, ...] = (
        _slash([0, 1, 70, 200, 333], [0, 1, 4]),
        _slash([5, 64], [0, 2]),
        _slash([], [0, 1, 2, 3, 4, 5, 6]),
        _slash([3, 127, 128, 390], [0]),
    )
    documents = np.repeat(np.arange(4), [50, 150, 131, 54]).astype(np.int32)
    return {
        "many": PatternCase(
            pattern=anchor_pattern(seq_len_tokens=2000, density=0.2, columns=20, heads=4, block_size=16), kv_heads=2
        ),
        "gqa": PatternCase(pattern=LayerPattern(seq_len_tokens=405, block_size=64, heads=gqa), kv_heads=2),
        "documents": PatternCase(
            pattern=LayerPattern(
                seq_len_tokens=385,
                block_size=64,
                heads=(
                    _slash([0, 60, 210], [0, 1]),
                    _random_blocks(7, 0.4, 1, columns=[0, 3, 70, 71, 230]),
                    _random_blocks(7, 0.1, 2, columns=[0]),
                ),
                documents=documents,
                anchor_tokens=1,
            ),
            kv_heads=3,
        ),
        "windows": PatternCase(
            pattern=LayerPattern(
                seq_len_tokens=405,
                block_size=64,
                heads=(
                    windowed(100, block_size=64, blocks=7, columns=[0, 1, 2, 170, 300]),
                    windowed(64, block_size=64, blocks=7, diagonals=[4]),
                    windowed(30, block_size=64, blocks=7, columns=[5, 130, 131, 132, 390]),
                    windowed(250, block_size=64, blocks=7, diagonals=[3]),
                ),
                documents=np.repeat(np.arange(2), [230, 175]).astype(np.int32),
            ),
            kv_heads=2,
            softcap=2.0,
            sinks=(-1.0, 0.0, 0.5, 2.0),
        ),
        "empty-rows": PatternCase(
            pattern=LayerPattern(seq_len_tokens=320, block_size=64, heads=(_slash([], [2]), _slash([7, 250], [3]))),
            kv_heads=1,
        ),
    }


PATTERNS = _patterns()


def _layouts(world_size: int) -> Iterator[Layout]:
    yield Ring(prefetch=1)
    if world_size > 2:
        yield Ring(prefetch=2)
        yield Gather(chunks=2)
        yield Gather(chunks=2, keep_kv=True)
    yield Gather(chunks=1)
    if world_size in (2, 4):
        yield Gather(chunks=world_size // 2, pull=True)
    if world_size == 4:
        yield Gather(chunks=2, keep_kv=True, pull=True)
    yield Collective()
    if world_size == 4:
        yield Hierarchical(inner_size=2)
        yield TwoLevel(inner_size=2)
        yield TwoLevel(inner_size=2, halves=True, late_columns=True)
        yield TwoLevel(inner_size=2, halves=True)


def _degrees(world_size: int, pattern: PatternCase) -> Iterator[Layout]:
    """Head parallelism by groups of ranks that the pattern's heads can be split over."""
    heads, kv_heads = pattern.pattern.num_heads, pattern.kv_heads
    for degree in range(2, world_size + 1):
        evenly = not max(degree, kv_heads) % min(degree, kv_heads)
        if not world_size % degree and not heads % degree and evenly:
            yield Ulysses(degree=degree, chunks=1 + world_size // degree)


IN_CASES = ("gqa", "documents", "windows", "empty-rows")


def _cases() -> Iterator[Case]:
    """Every layout at every placement and world size, each time with the next of the patterns that it can have.

    Layout, placement and pattern meet each other at every world size (test_ring_gloo.py counts the pairs): a layout
    moves shards whatever pairs a pattern activates, so what goes wrong does with a placement, or with a pattern.
    """
    placements = (("contiguous", 64), ("zigzag", 64), ("striped", 1), ("striped", 64), ("balanced", 64))
    for world_size in (1, 2, 3, 4):
        fitting: dict[Layout, list[str]] = {}
        for pattern in IN_CASES:
            for layout in [*_layouts(world_size), *_degrees(world_size, PATTERNS[pattern])]:
                fitting.setdefault(layout, []).append(pattern)
        for row, (layout, able) in enumerate(fitting.items()):
            for column, (placement, granularity) in enumerate(placements):
                turn = [able[(row + column) % len(able)]] if world_size > 1 else able  # alone there are few layouts
                for pattern in turn:
                    yield Case(world_size=world_size, placement=placement, granularity_tokens=granularity,
                               layout=layout, pattern=pattern)  # fmt: skip


CASES = list(_cases())


def make_placement(case: Case, pattern: LayerPattern) -> Placement:
    """Return the case's placement."""
    common = {
        "seq_len_tokens": pattern.seq_len_tokens,
        "world_size": case.world_size,
        "granularity_tokens": case.granularity_tokens,
    }
    if case.placement != "balanced":
        return REGULAR_PLACEMENTS[case.placement](**common)
    padded = REGULAR_PLACEMENTS["striped"](**common).padded_tokens
    load = unit_load([pattern], granularity_tokens=case.granularity_tokens, padded_tokens=padded)
    return balanced(unit_load=load, **common)


def make_case_plan(
    case: Case, *, dtype: str = "float64", backend: str = "blockwise", head_dim: int = 16, leave_out: bool = False,
    head_orders: tuple[tuple[int, ...], ...] | None = None, backward: Layout | None = None,
) -> Plan:  # fmt: skip
    """Return the case's plan; leave_out: without the pairs of shards that its pattern does not need."""
    chosen = PATTERNS[case.pattern]
    pattern, placement = chosen.pattern, make_placement(case, PATTERNS[case.pattern].pattern)
    return make_plan(
        attention=AttentionSpec(
            model=ModelShape(
                layers=len(head_orders or (0,)), heads=pattern.num_heads, kv_heads=chosen.kv_heads, head_dim=head_dim
            ),
            seq_len_tokens=pattern.seq_len_tokens,
            block_size=pattern.block_size,
            dtype=dtype,  # pyright: ignore[reportArgumentType]  # refused there
            columns_capacity=-(-pattern.max_columns // 64) * 64,
        ),
        placement=placement,
        forward=case.layout,
        backward=backward,
        pattern=PatternSpec(source="trace"),
        kernels=KernelSpec.model_validate({"backend": backend}),
        pairs=pattern_pairs(pattern, placement) if leave_out else None,
        head_orders=head_orders,
    )


@cache
def expected(pattern_name: str, tokens: int, *, seed: int, batch: int = 1, head_dim: int = 16) -> dict[str, np.ndarray]:
    """Return the reference's out, lse, dq, dk, dv of a sequence padded to `tokens`; padding attends nothing."""
    chosen = PATTERNS[pattern_name]
    heads = (chosen.pattern.num_heads, chosen.kv_heads)
    q, k, v, grad_out = global_tensors(tokens, heads, head_dim, seed=seed, batch=batch)
    mask = mask_of(chosen.pattern, columns_capacity=chosen.pattern.max_columns, device=torch.device("cpu"))
    if chosen.sinks is not None:
        assert batch == 1
        given = Inputs(q=q, k=k, v=v, grad_out=grad_out, scale=head_dim**-0.5, softcap=chosen.softcap,
                       sinks=torch.tensor(chosen.sinks, dtype=torch.float64))  # fmt: skip
        return {name: t.numpy() for name, t in attend(_attended(chosen.pattern), given).items()}
    out, lse = reference_attention(q, k, v, mask, scale=head_dim**-0.5)
    dq, dk, dv = reference_gradients(grad_out, q, k, v, mask, scale=head_dim**-0.5)
    return {name: t.numpy() for name, t in {"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv}.items()}


def _attended(pattern: LayerPattern) -> Attended:
    """Return what a pattern of diagonals attends, for the definition that is apart from the package's."""
    heads = [head for head in pattern.heads if isinstance(head, VerticalSlash)]
    active = torch.zeros(len(heads), pattern.num_blocks, dtype=torch.bool)
    for own, head in zip(active, heads, strict=True):
        own[torch.from_numpy(head.whole.astype(np.int64))] = True
    return Attended(
        seq_len_tokens=pattern.seq_len_tokens, block_size=pattern.block_size, active=active,
        windows=tuple(head.window_tokens for head in heads), columns=tuple(tuple(h.columns.tolist()) for h in heads),
        documents=None if pattern.documents is None else torch.from_numpy(pattern.documents),
    )  # fmt: skip


TOLERANCE = 1e-8


def largest_difference(left: np.ndarray, right: np.ndarray) -> float:
    """Return the largest difference; equal infinities differ by 0, NaN never passes."""
    with np.errstate(invalid="ignore"):
        difference = np.where(left == right, 0.0, np.abs(left - right))
    return float(np.nan_to_num(difference, nan=np.inf).max())
