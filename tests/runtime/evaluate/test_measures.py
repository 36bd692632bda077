"""Density with columns and the reach of far queries, against the definition of who attends whom, pair by pair."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sparsering.kernels.mask import AttentionMask, block_part, whole
from sparsering.runtime.evaluate.measures import densities, unattended

SIZE, TOKENS = 16, 150  # the last block is not full


def masks() -> dict[str, AttentionMask]:
    """Masks of every kind: two heads each."""
    generator = torch.Generator().manual_seed(0)
    blocks = -(-TOKENS // SIZE)
    documents = torch.repeat_interleave(torch.arange(4), torch.tensor([37, 61, 5, TOKENS - 103])).int()
    diagonals = torch.rand(2, blocks, generator=generator) < 0.3
    diagonals[:, 0] = True
    pairs = torch.rand(2, blocks, blocks, generator=generator) < 0.2
    pairs |= torch.eye(blocks, dtype=torch.bool)
    columns = torch.stack([torch.randperm(TOKENS, generator=generator)[:9].sort().values for _ in range(2)]).int()
    columns[1, 6:] = TOKENS  # empty slots
    given: dict[str, Any] = {"seq_len_tokens": TOKENS, "block_size": SIZE}
    return {
        "diagonals": AttentionMask(active=diagonals, **given),
        "diagonals and columns": AttentionMask(active=diagonals, columns=columns, **given),
        "pairs and columns": AttentionMask(active=pairs.tril(), columns=columns, **given),
        "own blocks not active": AttentionMask(active=pairs.tril(-1), columns=columns, **given),
        "documents": AttentionMask(active=diagonals, columns=columns, documents=documents, **given),
        "windows": AttentionMask(active=diagonals & False, columns=columns, windows=(40, 3), **given),
    }


def by_definition(mask: AttentionMask, head: int, far: int) -> tuple[float, float | None]:
    """Density with columns, and the share of keys that no far query attends."""
    every = torch.arange(TOKENS)
    attended = whole(mask, head, every, every)
    blocks = computed_blocks(mask, head)
    outside = attended & ~blocks[every // SIZE][:, every // SIZE]
    total = (blocks.sum() * SIZE**2 + outside.sum()) / (mask.blocks * (mask.blocks + 1) / 2 * SIZE**2)
    distance = every[:, None] - every[None, :]
    same = torch.ones_like(attended)
    if mask.documents is not None:
        same = mask.documents[:, None] == mask.documents[None, :]
    asked = ((distance > far) & same).any(0)
    reached = (attended & (distance > far)).any(0)
    return float(total), float((asked & ~reached).sum() / asked.sum()) if asked.any() else None


def computed_blocks(mask: AttentionMask, head: int) -> Tensor:
    """bool [N, N]: blocks of which the block part attends anything."""
    every = torch.arange(TOKENS)
    pairs = block_part(mask, head, every, every)
    padded = torch.zeros(mask.blocks * SIZE, mask.blocks * SIZE, dtype=torch.bool)
    padded[:TOKENS, :TOKENS] = pairs
    return padded.unflatten(0, (-1, SIZE)).unflatten(2, (-1, SIZE)).any(3).any(1)


@pytest.mark.parametrize("name", masks())
@pytest.mark.parametrize("far", [0, 5, 16, 33, 90, 149])
def test_measures_agree_with_the_definition(name: str, far: int):
    mask = masks()[name]
    expected = [by_definition(mask, head, far) for head in range(2)]
    blocks, total = densities(mask)
    assert total.tolist() == pytest.approx([one for one, _ in expected])
    counted = [float(computed_blocks(mask, head).sum()) / (mask.blocks * (mask.blocks + 1) / 2) for head in range(2)]
    assert blocks.tolist() == pytest.approx(counted)
    shares = unattended(mask, far)
    assert (shares is None) == (expected[0][1] is None)
    if shares is not None:
        assert shares.tolist() == pytest.approx([share for _, share in expected])


def test_dense_attention_has_density_one():
    blocks = -(-TOKENS // SIZE)
    mask = AttentionMask(seq_len_tokens=TOKENS, block_size=SIZE, active=torch.ones(1, blocks, dtype=torch.bool))
    assert [one.tolist() for one in densities(mask)] == [[1.0], [1.0]]
