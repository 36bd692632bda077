"""What some query rows attend to over a sequence whose tokens lie on many ranks: the data that selectors choose by.

Every rank calls these with its own shard; the injected collectives make the results equal everywhere. Nothing here
waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..mask import AttentionMask, allowed_pairs, whole
from ..merge import accumulator_dtype

PROBE_QUERIES = 64


def _alone(x: Tensor) -> Tensor:
    return x


@dataclass(frozen=True, kw_only=True)
class Collectives:
    """Element-wise sum and maximum over ranks: they take a contiguous tensor, may overwrite it, return the result."""

    all_reduce_sum: Callable[[Tensor], Tensor] = _alone
    all_reduce_max: Callable[[Tensor], Tensor] = _alone


ALONE = Collectives()


@dataclass(frozen=True, kw_only=True)
class ShardTensors:
    """One rank's queries and keys, after position encoding.

    q [1, S, H, D], k [1, S, H_kv, D]; positions [S], ascending global positions of the local tokens (padding has
    positions >= seq_len_tokens); granularity_tokens: local tokens come in runs of so many consecutive positions
    (1 is always true); documents: as in AttentionMask; softcap: of the scores, see values.Queries.
    Raises ValueError for a batch other than 1 (a pattern belongs to one sequence) and for shapes that do not fit.
    """

    q: Tensor
    k: Tensor
    positions: Tensor
    seq_len_tokens: int
    block_size: int
    granularity_tokens: int = 1
    documents: Tensor | None = None
    softcap: float | None = None

    def __post_init__(self) -> None:
        if self.q.dim() != 4 or self.k.dim() != 4 or self.q.shape[0] != 1 or self.k.shape[0] != 1:
            raise ValueError(
                f"q, k: shapes {tuple(self.q.shape)}, {tuple(self.k.shape)} are not [1, S, H, D]: a "
                "pattern is chosen for one sequence"
            )
        if self.q.shape[2] % self.k.shape[2] or self.q.shape[3] != self.k.shape[3]:
            raise ValueError(f"q, k: shapes {tuple(self.q.shape)}, {tuple(self.k.shape)} differ in D, or H % H_kv != 0")
        if self.positions.shape != self.q.shape[1:2] or self.q.shape[1] != self.k.shape[1]:
            raise ValueError(f"positions: shape {tuple(self.positions.shape)} is not [{self.q.shape[1]}]")
        if self.granularity_tokens < 1 or self.q.shape[1] % self.granularity_tokens:
            raise ValueError(f"granularity_tokens: {self.granularity_tokens} does not divide {self.q.shape[1]} tokens")

    @classmethod
    def whole(
        cls, q: Tensor, k: Tensor, *, block_size: int, softcap: float | None = None, documents: Tensor | None = None
    ) -> Self:
        """Return a sequence q [1, S, H, D], k [1, S, H_kv, D] that no other rank has a part of."""
        tokens = q.shape[1]
        return cls(q=q, k=k, positions=torch.arange(tokens, device=q.device), seq_len_tokens=tokens,
                   block_size=block_size, granularity_tokens=tokens, softcap=softcap,
                   documents=documents)  # fmt: skip

    @property
    def heads(self) -> int:
        """H, the query heads."""
        return self.q.shape[2]

    @property
    def blocks(self) -> int:
        """N, the mask blocks of the sequence."""
        return -(-self.seq_len_tokens // self.block_size)

    def chosen(self, active: Tensor, columns: Tensor | None = None, *, anchors: int = 0) -> AttentionMask:
        """Return a choice as a mask: bool [H, N] diagonals or [H, N, N] pairs, own blocks among them, and columns.

        anchors: how many of the first columns all documents attend.
        """
        return AttentionMask(
            seq_len_tokens=self.seq_len_tokens, block_size=self.block_size, active=active, columns=columns,
            documents=self.documents, anchors=anchors, own_blocks=True,
        )  # fmt: skip


def last_positions(shard: ShardTensors, count: int = PROBE_QUERIES) -> Tensor:
    """int64 [min(count, seq_len)]: the last valid positions, whose queries are the usual probe."""
    return torch.arange(max(shard.seq_len_tokens - count, 0), shard.seq_len_tokens, device=shard.q.device)


def query_rows(shard: ShardTensors, row_positions: Tensor, collectives: Collectives) -> Tensor:
    """[H, R, D], in q's dtype: the queries at these global positions, wherever they live."""
    heads, dim = shard.q.shape[2:]
    found = shard.q.new_zeros(heads, row_positions.shape[0], dim)
    if shard.q.shape[1]:
        local = torch.searchsorted(shard.positions.long().contiguous(), row_positions)
        local = local.clamp_(max=shard.q.shape[1] - 1)
        owned = shard.positions[local] == row_positions
        found = torch.where(owned[None, :, None], shard.q[0, local].transpose(0, 1), found)
    return collectives.all_reduce_sum(found.contiguous())


def float_matmul(a: Tensor, b: Tensor) -> Tensor:
    """a [G, M, D] times b [G, D, N] in the accumulator dtype, exact in the inputs' products."""
    dtype = accumulator_dtype(a.dtype)
    if a.is_cuda and a.dtype != dtype:
        return torch.bmm(a, b, out_dtype=dtype)
    return torch.bmm(a.to(dtype), b.to(dtype))


def row_logits(shard: ShardTensors, rows: Tensor, row_positions: Tensor, *, scale: float) -> Tensor:
    """[H, R, S]: scaled logits of query rows [H, R, D] against the local keys, -inf where never allowed."""
    heads, count, dim = rows.shape
    kv_heads = shard.k.shape[2]
    keys = shard.k[0].permute(1, 2, 0)
    logits = float_matmul(rows.reshape(kv_heads, -1, dim), keys).mul_(scale).view(heads, count, -1)
    if shard.softcap is not None:
        logits = logits.div_(shard.softcap).tanh_().mul_(shard.softcap)
    everything = shard.chosen(torch.ones(1, shard.blocks, dtype=torch.bool, device=shard.q.device))
    return logits.masked_fill_(~allowed_pairs(everything, row_positions, shard.positions), -torch.inf)


def probabilities(logits: Tensor, collectives: Collectives) -> Tensor:
    """Softmax over the keys of all ranks of local logits [H, R, S] (overwritten)."""
    return probabilities_of([logits], collectives)[0]


def probabilities_of(logits: Sequence[Tensor], collectives: Collectives) -> list[Tensor]:
    """The same of several [H, R, S], R and S of each its own, with the collectives of one. At least one."""
    rows, lowest = [one.shape[1] for one in logits], torch.finfo(logits[0].dtype).min
    # An empty shard has nothing to take the maximum of.
    tops = [
        one.amax(-1).clamp_(min=lowest) if one.shape[2] else pad(one, (0, 1), value=lowest).amax(-1) for one in logits
    ]
    top = collectives.all_reduce_max(torch.cat(tops, dim=-1)).split(rows, dim=-1)
    p = [one.sub_(highest.unsqueeze(-1)).exp_() for one, highest in zip(logits, top, strict=True)]
    total = collectives.all_reduce_sum(torch.cat([one.sum(-1) for one in p], dim=-1)).split(rows, dim=-1)
    return [one.div_(its.unsqueeze(-1)) for one, its in zip(p, total, strict=True)]


def column_sums(shard: ShardTensors, values: Tensor) -> Tensor:
    """[H, seq_len]: per key position, the sum of local values [H, R, S] over the rows. Not yet summed over ranks."""
    total = values.new_zeros(values.shape[0], shard.seq_len_tokens + 1)
    total[:, shard.positions.long().clamp(max=shard.seq_len_tokens)] = values.sum(1)
    return total[:, :-1].contiguous()


def slash_sums(shard: ShardTensors, values: Tensor, row_positions: Tensor) -> Tensor:
    """[H, seq_len]: per token distance, the sum of local values [H, R, S] along it. Not yet summed over ranks.

    row_positions [R] are consecutive; values of keys after their query are 0.
    """
    if shard.granularity_tokens < values.shape[1]:
        total = values.new_zeros(values.shape[0], shard.seq_len_tokens)
        for row, position in enumerate(row_positions):
            total += _by_distance(shard, position - shard.positions.long(), values[:, row])
        return total
    heads, rows, _ = values.shape
    run = shard.granularity_tokens
    pitch = run + rows - 1
    # Row r of a run starts at r * pitch + rows - 1; read with a pitch one longer, equal distances stand in one column.
    flat = values.new_zeros(heads, values.shape[2] // run, rows * pitch + rows - 1)
    skewed = flat[..., : rows * pitch].unflatten(-1, (rows, pitch))
    skewed[..., rows - 1 :] = values.unflatten(2, (-1, run)).transpose(1, 2)
    sums = flat.as_strided((heads, flat.shape[1], rows, pitch), (*flat.stride()[:2], pitch + 1, 1)).sum(2)
    first = shard.positions.long()[::run]
    distances = row_positions[-1] - first[:, None] - torch.arange(pitch, device=first.device)[None, :]
    # Neighbouring runs share distances, at most two of them each: the order of the additions does not matter.
    return _by_distance(shard, distances.flatten(), sums.flatten(1))


def _by_distance(shard: ShardTensors, distances: Tensor, values: Tensor) -> Tensor:
    """[H, seq_len] with values [H, n] added at distances [n]; those outside the sequence are dropped."""
    outside = (distances < 0) | (distances >= shard.seq_len_tokens)
    total = values.new_zeros(values.shape[0], shard.seq_len_tokens + 1)
    total.index_add_(1, distances.masked_fill(outside, shard.seq_len_tokens), values)
    return total[:, :-1]


@torch.no_grad()
def kept_mass(
    shard: ShardTensors, mask: AttentionMask, row_positions: Tensor, *, scale: float, collectives: Collectives = ALONE
) -> Tensor:
    """[H]: the share of the rows' attention (causal, within documents) that the mask keeps, mean over the rows."""
    rows = query_rows(shard, row_positions, collectives)
    p = probabilities(row_logits(shard, rows, row_positions, scale=scale), collectives)
    kept = torch.stack(
        [(p[head] * whole(mask, head, row_positions, shard.positions)).sum() for head in range(shard.heads)]
    )
    return collectives.all_reduce_sum(kept) / row_positions.shape[0]


def kept_mass_probe(
    shard: ShardTensors, mask: AttentionMask, *, scale: float, collectives: Collectives = ALONE
) -> Tensor:
    """[H]: kept mass of the last valid queries, which selectors may choose by."""
    return kept_mass(shard, mask, last_positions(shard), scale=scale, collectives=collectives)


def kept_mass_sampled(
    shard: ShardTensors, mask: AttentionMask, *, scale: float, seed: int, rows: int = 64,
    collectives: Collectives = ALONE,
) -> Tensor:  # fmt: skip
    """[H]: kept mass of `rows` seeded random positions of the whole sequence, the same ones on every rank."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(shard.seq_len_tokens, generator=generator)[:rows].sort().values.to(shard.q.device)
    return kept_mass(shard, mask, chosen, scale=scale, collectives=collectives)
