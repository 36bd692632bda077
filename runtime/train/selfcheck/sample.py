"""What one check looks at, drawn alike on all ranks: layers, heads, and tokens of every rank.

Shape legend: R sampled tokens, W ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...attention.bound import BoundPlan


@dataclass(frozen=True, kw_only=True, eq=False)
class Tokens:
    """Sampled tokens of all ranks. positions: int64 [R] in the sequence; own: which of them are this rank's, and where.

    own: int64 [r], places in `positions`; local: int64 [r], the same tokens' places in this rank's shard.
    """

    positions: Tensor
    own: Tensor
    local: Tensor

    def gathered(self, shard: Tensor) -> Tensor:
        """Return float64 [R, ...]: of a tensor over this rank's shard [S_own, ...] the own sampled rows, zeros else."""
        rows = torch.zeros(self.positions.numel(), *shard.shape[1:], dtype=torch.float64, device=shard.device)
        rows[self.own] = shard[self.local].double()
        return rows


@dataclass(frozen=True, kw_only=True, eq=False)
class Sample:
    """One layer's part of a check. head: a query head, one of those that share kv_head; queries, keys: sampled tokens.

    heads: [first, last) of the query heads that share the K/V head.
    """

    layer: int
    head: int
    kv_head: int
    heads: tuple[int, int]
    queries: Tokens
    keys: Tokens


def draw_samples(bound: BoundPlan, *, layers: int, rows: int, seed: Sequence[int]) -> list[Sample]:
    """Return the samples of one check: `layers` different layers, in each `rows` queries and as many keys.

    Every rank has as many of the tokens as any other, and at least one. seed: of the run and of the step.
    """
    model = bound.plan.model
    generator = np.random.default_rng(seed)
    chosen = generator.choice(model.layers, min(layers, model.layers), replace=False)
    group = model.heads // model.kv_heads
    samples = []
    for layer in sorted(int(one) for one in chosen):
        kv_head = int(generator.integers(model.kv_heads))
        samples.append(Sample(
            layer=layer, head=kv_head * group + int(generator.integers(group)), kv_head=kv_head,
            heads=(kv_head * group, (kv_head + 1) * group), queries=_draw_tokens(bound, rows, generator),
            keys=_draw_tokens(bound, rows, generator),
        ))  # fmt: skip
    return samples


def _draw_tokens(bound: BoundPlan, rows: int, generator: np.random.Generator) -> Tokens:
    mesh, world_size = bound.mesh, bound.mesh.world_size
    each = max(1, rows // world_size)
    positions, own, local = [], None, None
    for rank in range(world_size):
        of_rank = bound.placement.positions(rank)
        valid = np.flatnonzero(of_rank < bound.plan.seq_len_tokens)
        places = np.sort(generator.choice(valid, min(each, valid.size), replace=False))
        if rank == mesh.rank:
            first = sum(part.size for part in positions)
            own, local = np.arange(first, first + places.size), places
        positions.append(of_rank[places])
    tensors = [torch.from_numpy(np.asarray(part, dtype=np.int64)) for part in (np.concatenate(positions), own, local)]
    return Tokens(**dict(zip(("positions", "own", "local"), (one.to(mesh.device) for one in tensors), strict=True)))
