"""What chosen masks hold: how dense they are with their columns, and which keys no far query attends.

Shape legend: S tokens, N mask blocks, H query heads.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...kernels.mask import AttentionMask, active_block_pairs, column_part, document_reach, edge_block_pairs
from ...kernels.select.probe import ShardTensors
from ..pattern.kept import measure_kept
from .result import LayerReach

ROWS_AT_ONCE = 4096


@dataclass(kw_only=True, eq=False)
class MaskMeasures:
    """Adds up what is found of the masks of several sequences, layer by layer, as float64 [H]; `watch` sees each mask.

    far_tokens: distances that reach is asked for, none where it is not. weighed: also measure kept mass. seed: of the
    queries that are sampled for it.
    """

    far_tokens: tuple[int, ...]
    weighed: bool
    seed: int
    _found: dict[int, list[dict[str, Tensor]]] = field(default_factory=dict)

    def watch(self, layer: int, mask: AttentionMask, shard: ShardTensors, scale: float) -> None:
        """Measure one mask."""
        active, total = densities(mask)
        found = {"density": active, "total": total}
        if self.weighed:
            found["kept"] = measure_kept(shard, mask, scale=scale, seed=self.seed).sampled.clamp(0, 1).double().cpu()
        for far in self.far_tokens:
            share = unattended(mask, far)
            if share is not None:
                found[f"far {far}"] = share
        self._found.setdefault(layer, []).append(found)

    def total_density(self) -> float | None:
        """Return the mean over layers, heads and sequences; None where nothing was chosen."""
        means = [float(self._mean(layer, "total").mean()) for layer in self._found]  # pyright: ignore[reportOptionalMemberAccess]
        return sum(means) / len(means) if means else None

    def rows(self) -> tuple[LayerReach, ...]:
        """Return what was found of each layer."""
        return tuple(
            LayerReach(
                layer=layer, density=_listed(self._mean(layer, "density")) or (),
                total_density=_listed(self._mean(layer, "total")) or (), kept_mass=_listed(self._mean(layer, "kept")),
                unattended={str(far): _listed(self._mean(layer, f"far {far}")) for far in self.far_tokens},
            )
            for layer in sorted(self._found)
        )  # fmt: skip

    def _mean(self, layer: int, name: str) -> Tensor | None:
        values = [one[name] for one in self._found[layer] if name in one]
        return torch.stack(values).mean(0) if values else None


def _listed(values: Tensor | None) -> tuple[float, ...] | None:
    return None if values is None else tuple(values.tolist())


def densities(mask: AttentionMask) -> tuple[Tensor, Tensor]:
    """Return the density of each head, float64 [H] on the host, of blocks alone and with columns.

    Active causal blocks, each whole, also those that a window cuts, over all causal blocks; then also each pair of a
    query and a column of it outside of these blocks, over the pairs of the blocks.
    """
    whole = mask.blocks * (mask.blocks + 1) / 2
    blocks, pairs = [], []
    for head in range(mask.heads):
        counted = _counted_blocks(mask, head)
        blocks.append(counted.sum().double() / whole)
        pairs.append(blocks[-1] + _column_pairs(mask, head, counted) / (whole * mask.block_size**2))
    return torch.stack(blocks).cpu(), torch.stack(pairs).cpu()


def unattended(mask: AttentionMask, far_tokens: int) -> Tensor | None:
    """Return for each head, float64 [H] on the host, the share of keys that no far query attends.

    Far: more than far_tokens later. Counted are keys that have such queries (in their own document where documents are
    given, which must not fall along the sequence); None where there is none.
    """
    tokens, device = mask.seq_len_tokens, mask.active.device
    keys = torch.arange(tokens, device=device)
    ends = torch.full_like(keys, tokens - 1)
    if mask.documents is not None:
        documents = mask.documents[:tokens].contiguous()
        ends = torch.searchsorted(documents, documents, right=True) - 1
    counted = ends - keys > far_tokens
    if not bool(counted.any()):
        return None
    shares = [
        (counted & ~(_last_query(mask, head, keys, ends) - keys > far_tokens)).sum().double() / counted.sum()
        for head in range(mask.heads)
    ]
    return torch.stack(shares).cpu()


def _last_query(mask: AttentionMask, head: int, keys: Tensor, ends: Tensor) -> Tensor:
    """Return int64 [S]: the last query, up to `ends`, that attends each key; -1 for none."""
    size, blocks = mask.block_size, torch.arange(mask.blocks, device=keys.device)
    active = active_block_pairs(mask, head, blocks[:, None], blocks[None, :]).tril()
    newest = torch.where(active, blocks[:, None], -1).cummax(0).values  # [N, N]: the last active query block so far
    block = newest[ends // size, keys // size]
    last = torch.where(block < 0, -1, torch.minimum((block + 1) * size - 1, ends))
    if mask.windows is not None:
        last = torch.maximum(last, torch.minimum(keys + mask.windows[head] - 1, ends))
    if mask.columns is not None:
        columns = mask.columns[head].long()
        last[columns[columns < mask.seq_len_tokens]] = ends[columns[columns < mask.seq_len_tokens]]
    return last


def _counted_blocks(mask: AttentionMask, head: int) -> Tensor:
    """Return bool [N, N]: the causal blocks that are computed, those without a common document left out."""
    block = torch.arange(mask.blocks, device=mask.active.device)
    query, key = block[:, None], block[None, :]
    computed = active_block_pairs(mask, head, query, key) | edge_block_pairs(mask, head, query, key)
    reach = document_reach(mask, transposed=False)
    within = query >= key if reach is None else (query >= key) & (query - key <= reach[:, None])
    return computed & within


def _column_pairs(mask: AttentionMask, head: int, counted: Tensor) -> Tensor:
    """Return how many pairs of a query and a column lie outside of the counted blocks, float64."""
    if mask.columns is None:
        return counted.new_zeros((), dtype=torch.float64)
    if mask.documents is None and mask.windows is None:
        return _plain_column_pairs(mask, head, counted)
    total = counted.new_zeros((), dtype=torch.float64)
    columns = mask.columns[head].long().clamp(max=mask.seq_len_tokens - 1) // mask.block_size
    for first in range(0, mask.seq_len_tokens, ROWS_AT_ONCE):
        until = min(first + ROWS_AT_ONCE, mask.seq_len_tokens)
        rows = torch.arange(first, until, device=counted.device)
        outside = ~counted[rows // mask.block_size][:, columns]
        total += (column_part(mask, head, rows) & outside).sum()
    return total


def _plain_column_pairs(mask: AttentionMask, head: int, counted: Tensor) -> Tensor:
    """The same where only causality cuts them: a column has all later queries of the blocks where it is not active."""
    assert mask.columns is not None
    size, columns = mask.block_size, mask.columns[head].long()
    columns = columns[columns < mask.seq_len_tokens]
    rows = torch.full((mask.blocks,), size, device=counted.device)
    rows[-1] = mask.seq_len_tokens - (mask.blocks - 1) * size
    later = (~counted).tril(-1) * rows[:, None]  # [N, N]: queries of later blocks that see the key block by columns
    own = ~counted.diagonal()[columns // size]
    ends = torch.clamp((columns // size + 1) * size, max=mask.seq_len_tokens)
    return later.sum(0)[columns // size].sum().double() + torch.where(own, ends - columns, 0).sum()
