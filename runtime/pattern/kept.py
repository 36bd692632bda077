"""How much of a layer's attention its chosen pattern keeps: for the queries that chose, for others, for each document.

Shape legend: H query heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...kernels.mask import AttentionMask
from ...kernels.select.packed import documents_of, kept_mass_of_documents, last_queries
from ...kernels.select.probe import ALONE, Collectives, ShardTensors, kept_mass_probe, kept_mass_sampled

SAMPLED_ROWS = 64


@dataclass(frozen=True, kw_only=True, eq=False)
class KeptMass:
    """Shares of attention kept, means over queries.

    probe: [H], of the last queries, with packed documents those of all of them; sampled: [H], of seeded ones;
    documents: [H, documents], of the last queries of each, None without documents.
    """

    probe: Tensor
    sampled: Tensor
    documents: Tensor | None = None

    def by_head(self) -> list[dict[str, Any]]:
        """Return what a row of a trace says of each head. Waits for the device."""
        probe, sampled = (mass.clamp(0, 1).tolist() for mass in (self.probe, self.sampled))
        of_documents = [None] * len(probe)
        if self.documents is not None:
            of_documents = [tuple(masses) for masses in self.documents.clamp(0, 1).tolist()]
        return [
            {"kept_mass_probe": near, "kept_mass_sampled": far, "kept_mass_documents": each}
            for near, far, each in zip(probe, sampled, of_documents, strict=True)
        ]


def measure_kept(
    shard: ShardTensors, mask: AttentionMask, *, scale: float, seed: int, rows: int = SAMPLED_ROWS,
    collectives: Collectives = ALONE,
) -> KeptMass:  # fmt: skip
    """Return what a mask keeps of a shard's sequence: collective, the same on every rank.

    seed, rows: of the sampled queries, and how many. Of documents where all own blocks are active, as selectors see to.
    """
    given: dict[str, Any] = {"scale": scale, "collectives": collectives}
    sampled = kept_mass_sampled(shard, mask, seed=seed, rows=rows, **given)
    if shard.documents is None or not mask.own_blocks:
        return KeptMass(probe=kept_mass_probe(shard, mask, **given), sampled=sampled)
    each = kept_mass_of_documents(shard, mask, **given)
    counts = last_queries(documents_of(shard.documents, shard.seq_len_tokens))
    weights = torch.tensor(counts, dtype=each.dtype, device=each.device)
    return KeptMass(probe=each @ weights / sum(counts), sampled=sampled, documents=each)
