"""docs/worked-choice.md: its row is chosen by the selector, and its figures are those of the text."""

from __future__ import annotations

from pathlib import Path

import torch

from sparsering.kernels.plain.reference import reference_attention
from sparsering.kernels.select.probe import ShardTensors
from sparsering.kernels.select.rows.block_mass import BlockMass

PAGE = (Path(__file__).parents[3] / "docs" / "worked-choice.md").read_text()


def _numbers(row: str) -> list[float]:
    """The cells of the table row that begins with this word."""
    (line,) = (line for line in PAGE.splitlines() if line.startswith(f"| {row} |"))
    return [float(cell) for cell in line.split("|")[2:-1] if cell.strip()]


def _rows(begins: str) -> list[list[float]]:
    return [
        [float(cell) for cell in line.split("|")[2:-1] if cell.strip()]
        for line in PAGE.splitlines()
        if line.startswith(f"| {begins} |")
    ]


def test_the_page_says_what_the_selector_does() -> None:
    (six, six_shares), (seven, seven_shares) = _rows("query 6"), _rows("query 7")
    assert sum(six) == sum(seven) == 20
    weights = torch.ones(8, 8, dtype=torch.float64)
    weights[6, :7], weights[7] = torch.tensor(six), torch.tensor(seven)
    # Query i is the i-th unit vector, so that its score of key j is the logarithm of its weight.
    q, k = torch.eye(8, dtype=torch.float64)[None, :, None], weights.log().T.contiguous()[None, :, None]
    shard = ShardTensors.whole(q, k, block_size=2)
    mask = BlockMass(probe_stride=1, least_mass=0.28).choose(shard, scale=1.0)
    assert mask.active[0, 3].tolist() == [True, False, True, True]
    p = (weights[6:].tril(6) / 20).view(2, 4, 2).sum(2)
    assert torch.allclose(p, torch.tensor([six_shares, seven_shares], dtype=torch.float64))
    assert torch.allclose(p.mean(0), torch.tensor(_numbers("both"), dtype=torch.float64))
    v = torch.eye(8, dtype=torch.float64)[None, :, None]
    out, _ = reference_attention(q, k, v, mask, scale=1.0)
    wanted = torch.tensor([5, 1, 0, 0, 8, 2, 2, 0], dtype=torch.float64) / 18
    assert torch.allclose(out[0, 6, 0], wanted)


def test_the_bounds_on_the_number_of_blocks_hold() -> None:
    assert 1 / BlockMass().least_mass == 200 and "at most 1 ÷ `least_mass` blocks" in PAGE
