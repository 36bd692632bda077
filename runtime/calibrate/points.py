"""Timing single launches: one query shard, the key shards that it attends, and gathered columns, as runs launch them.

Shape legend: S tokens of a shard, n key shards, H query heads, H_kv K/V heads, D head dim, C columns.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...kernels import api
from ...kernels.mask import AttentionMask
from ...planner.cost.counts import LaunchCounts
from ...planner.cost.tables import LaunchPoint, MaskKind
from ...planner.schedule.pairs import documents_share
from ...planner.schedule.placement import REGULAR_PLACEMENTS, Placement
from ...planner.schedule.workload import Workload, workload
from ...planner.specs import ModelShape
from ...traces.pattern import BlockMask, LayerPattern, VerticalSlash
from ...traces.synthetic import SyntheticSettings, synthesize
from ..attention.masks import mask_of

SLEEP_CYCLES = 30_000_000  # some 15 ms, in which the host issues what is timed
SLEEP_US = 12_000.0  # what of it the host may take longer than the device, at most
# On an H200 layers of 10 ms and more took 4 to 13 % longer than their launches, timed in short bursts, had promised:
# GPUs are known to clock lower under lasting load. So a launch is repeated for so long, and its later repeats count.
SUSTAINED_US, FEWEST_REPEATS, MOST_REPEATS = 150_000.0, 5, 400
WARMUPS = 2
CPU_WARMUPS, CPU_REPEATS = 0, 3  # nothing is compiled, no clock has to rise: the first call of a shape came before


@dataclass(frozen=True, kw_only=True)
class Case:
    """What one query shard attends: the keys of its own rank, or of all others together.

    kind: of the synthetic mask; world_size: ranks that share its seq_len_tokens by stripes; rank: whose queries.
    """

    kind: str
    seq_len_tokens: int
    world_size: int
    rank: int
    density: float
    columns: int = 0
    joined: bool = False
    seed: int = 0


@dataclass(frozen=True, kw_only=True, eq=False)
class Drawn:
    """A case's mask and where its tokens are; counts: of the whole layer."""

    case: Case
    pattern: LayerPattern
    mask: AttentionMask
    placement: Placement
    counts: Workload


def draw(case: Case, model: ModelShape, block_size: int, device: torch.device) -> Drawn:
    """Draw the mask of a case, and count its work as the planner does."""
    settings = SyntheticSettings(
        seq_len_tokens=case.seq_len_tokens,
        heads=model.heads,
        block_size=block_size,
        density=case.density,
        columns=case.columns,
        mean_document_tokens=max(1, int(case.seq_len_tokens * case.density / 2)),
    )
    listed = case.kind == "listed-documents"
    pattern = synthesize("packed-documents" if listed else case.kind, settings, seed=case.seed)
    pattern = as_bits(pattern) if listed else pattern
    placement = REGULAR_PLACEMENTS["striped"](
        seq_len_tokens=case.seq_len_tokens, world_size=case.world_size, granularity_tokens=block_size
    )
    mask = mask_of(pattern, columns_capacity=pattern.max_columns, device=device)
    return Drawn(case=case, pattern=pattern, mask=mask, placement=placement, counts=workload(pattern, placement))


def as_bits(pattern: LayerPattern) -> LayerPattern:
    """Return packed documents as a selector that looks at data gives them: active blocks as bits."""
    bits = documents_share(
        pattern.documents, pattern.block_size, pattern.seq_len_tokens, np.tri(pattern.num_blocks, dtype=bool)
    )
    return replace(pattern, heads=tuple(BlockMask(bits=bits) for _ in pattern.heads))


def kind_of(pattern: LayerPattern) -> MaskKind:
    """Return which kernels and indexes a pattern takes."""
    listed = not all(isinstance(head, VerticalSlash) for head in pattern.heads)
    return MaskKind(listed=listed, documents=pattern.documents is not None)


@dataclass(kw_only=True, eq=False)
class _Shard:
    """Tensors of one case: q, grad_out [1, S, H, D], k and v [1, n * S, H_kv, D], columns [2, 1, H, C, D] or None."""

    drawn: Drawn
    backend: str
    q: Tensor
    grad_out: Tensor
    k: Tensor
    v: Tensor
    columns: Tensor | None
    own_positions: Tensor
    key_positions: Tensor
    parts: tuple[int, ...]

    @property
    def scale(self) -> float:
        return self.q.shape[-1] ** -0.5

    def keys(self, index: api.BlockIndex) -> api.Keys:
        return api.Keys(k=self.k, v=self.v, index=index)

    def index(self) -> api.BlockIndex:
        return api.block_index(self.drawn.mask, self.own_positions, self.key_positions, backend=self.backend)

    def column_part(self) -> api.Columns | None:
        if self.columns is None:
            return None
        index = api.column_index(self.drawn.mask, self.own_positions, backend=self.backend)
        return api.Columns(k=self.columns[0], v=self.columns[1], index=index)


def measure(drawn: Drawn, model: ModelShape, backend: str, dtype: torch.dtype) -> list[LaunchPoint]:
    """Time forward and backward of a case: with an index that is there, and with one that must be made."""
    shard = _shard(drawn, model, backend, dtype)
    case, work = drawn.case, drawn.counts
    heads = (0, model.heads)
    keyed = [work.block_task(case.rank, part, heads) for part in shard.parts]
    columns = [work.columns_task(case.rank, heads)] if shard.columns is not None else []
    counts = LaunchCounts.of_work(keyed, columns, heads=model.heads)
    if not counts.tile_pairs:
        return []
    shared = {"mask": kind_of(drawn.pattern), "counts": counts, "key_bytes": 2 * shard.k.nbytes}
    forward = _forward_times(shard)
    backward = _backward_times(shard)
    return [
        LaunchPoint(direction="forward", **shared, **forward),
        LaunchPoint(direction="backward", **shared, **backward),
    ]


def _shard(drawn: Drawn, model: ModelShape, backend: str, dtype: torch.dtype) -> _Shard:
    case, placement = drawn.case, drawn.placement
    device = drawn.mask.active.device
    others = tuple(part for part in range(case.world_size) if part != case.rank)
    parts = others if case.joined else (case.rank,)
    positions = [torch.from_numpy(placement.positions(part)).to(device) for part in range(case.world_size)]
    tokens = positions[0].numel()
    generator = torch.Generator(device).manual_seed(case.seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=torch.float32).to(dtype)

    capacity = drawn.mask.column_capacity
    return _Shard(
        drawn=drawn,
        backend=backend,
        q=random(1, tokens, model.heads, model.head_dim),
        grad_out=random(1, tokens, model.heads, model.head_dim),
        k=random(1, len(parts) * tokens, model.kv_heads, model.head_dim),
        v=random(1, len(parts) * tokens, model.kv_heads, model.head_dim),
        columns=random(2, 1, model.heads, capacity, model.head_dim) if capacity and not case.joined else None,
        own_positions=positions[case.rank],
        key_positions=torch.cat([positions[part] for part in parts]) if case.joined else positions[case.rank],
        parts=parts,
    )


def _forward_times(shard: _Shard) -> dict[str, Any]:
    queries = api.Queries(q=shard.q, scale=shard.scale)
    index, columns = shard.index(), shard.column_part()
    result = api.forward(queries, shard.keys(index), columns)

    def earlier() -> api.Partial:
        return result[0].clone(), result[1].clone()

    ready = _timed(lambda: None, lambda _: api.forward(queries, shard.keys(index), columns), shard.q.device)
    resumed = _timed(
        earlier, lambda past: api.forward(queries, shard.keys(index), columns, earlier=past), shard.q.device
    )

    def with_new_index(_: None) -> api.Partial:
        return api.forward(queries, shard.keys(shard.index()), shard.column_part())

    fresh = _timed(lambda: None, with_new_index, shard.q.device)
    return _as_fields(ready, resumed, fresh)


def _backward_times(shard: _Shard) -> dict[str, Any]:
    queries = api.Queries(q=shard.q, scale=shard.scale)
    columns = shard.column_part()
    out, lse = api.forward(queries, shard.keys(shard.index()), columns, final=True)
    delta = api.backend_of(shard.backend).row_products(shard.grad_out, out)
    given = api.BackwardQueries(q=shard.q, scale=shard.scale, grad_out=shard.grad_out, lse=lse, delta=delta)
    wide = api.accumulator_dtype(shard.q.dtype)
    total = torch.empty_like(shard.q, dtype=wide)
    grads = torch.empty_like(shard.k, dtype=wide), torch.empty_like(shard.v, dtype=wide)

    def launch(index: api.BlockIndex, *, add: bool) -> None:
        of_columns = None
        if columns is not None:
            room = torch.empty(2, *columns.k.shape, device=total.device, dtype=wide)
            of_columns = api.KeyGradients(k=room[0], v=room[1], add=False)
        into = api.Gradients(
            query=api.QueryGradient(total=total, add=add),
            keys=api.KeyGradients(k=grads[0], v=grads[1], add=False),
            columns=of_columns,
        )
        api.backward(given, shard.keys(index), columns, into)

    def fresh_index() -> api.BlockIndex:
        index = shard.index()
        api.forward(queries, shard.keys(index))  # as a layer's forward leaves it
        return index

    index = fresh_index()
    launch(index, add=False)
    ready = _timed(lambda: None, lambda _: launch(index, add=False), shard.q.device)
    resumed = _timed(lambda: None, lambda _: launch(index, add=True), shard.q.device)
    fresh = _timed(fresh_index, lambda made: launch(made, add=False), shard.q.device)
    return _as_fields(ready, resumed, fresh)


@dataclass(frozen=True, kw_only=True)
class Times:
    """Microseconds of the device, and of the host while it issued."""

    device_us: float
    host_us: float


def _as_fields(ready: Times, resumed: Times, fresh: Times) -> dict[str, Any]:
    return {
        "launch_us": ready.device_us,
        "resumed_us": resumed.device_us,
        "fresh_us": fresh.device_us,
        "host_us": ready.host_us,
        "fresh_host_us": fresh.host_us,
    }


def _timed(prepare: Callable[[], Any], body: Callable[[Any], Any], device: torch.device) -> Times:
    """Return medians of what `body` takes on the device while the host is ahead, and on the host while it issues."""
    if device.type != "cuda":
        found = [once(prepare, body, device) for _ in range(CPU_WARMUPS + CPU_REPEATS)][CPU_WARMUPS:]
    else:
        alone = [once(prepare, body, device) for _ in range(WARMUPS)][-1]
        found = _sustained(prepare, body, repeats_of(alone))
    return Times(
        device_us=statistics.median(one.device_us for one in found),
        host_us=statistics.median(one.host_us for one in found),
    )


def repeats_of(alone: Times) -> int:
    """Return how often a launch is repeated: for SUSTAINED_US, or as long as the host can stay ahead of the device."""
    wanted = SUSTAINED_US / max(alone.device_us, 1.0)
    behind_us = 2 * alone.host_us - alone.device_us  # what is prepared between two takes the host as much again
    ahead = SLEEP_US / behind_us if behind_us > 0 else wanted
    return int(min(max(min(wanted, ahead), FEWEST_REPEATS), MOST_REPEATS))


def _sustained(prepare: Callable[[], Any], body: Callable[[Any], Any], repeats: int) -> list[Times]:
    """Time `body` so many times in a row, the host ahead of the device, and return the later half."""
    torch.cuda.synchronize()
    torch.cuda._sleep(SLEEP_CYCLES)
    marks, hosts_us = [], []
    for _ in range(repeats):
        given = prepare()
        marks.append(tuple(torch.cuda.Event(enable_timing=True) for _ in range(2)))
        began = time.perf_counter()
        marks[-1][0].record()
        body(given)
        marks[-1][1].record()
        hosts_us.append(1e6 * (time.perf_counter() - began))
    torch.cuda.synchronize()
    later = list(zip(marks, hosts_us, strict=True))[repeats // 2 :]
    return [Times(device_us=1e3 * first.elapsed_time(last), host_us=host_us) for (first, last), host_us in later]


def once(prepare: Callable[[], Any], body: Callable[[Any], Any], device: torch.device) -> Times:
    """Time `body` of what `prepare` gives, on an idle device, with the host ahead of it."""
    given = prepare()
    if device.type != "cuda":
        began = time.perf_counter()
        body(given)
        return Times(device_us=1e6 * (time.perf_counter() - began), host_us=0.0)
    torch.cuda.synchronize()
    torch.cuda._sleep(SLEEP_CYCLES)
    started, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    started.record()
    began = time.perf_counter()
    body(given)
    host_us = 1e6 * (time.perf_counter() - began)
    ended.record()
    torch.cuda.synchronize()
    return Times(device_us=1e3 * started.elapsed_time(ended), host_us=host_us)
