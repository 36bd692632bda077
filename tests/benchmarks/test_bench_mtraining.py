"""benchmarks/lib/mtraining.py: a mask in MTraining's coordinates, and what is refused before any GPU is asked."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sparsering.benchmarks import ring
from sparsering.benchmarks.lib.masks import documents_mask, moba_like_mask, slash_mask
from sparsering.benchmarks.lib.mtraining import BLOCK, PeerIndices, peer_indices, refusal
from sparsering.kernels.mask import whole
from sparsering.planner.schedule.placement import striped
from sparsering.traces.errors import InputError, UnsupportedError


def covered_pairs(indices: PeerIndices, head: int, *, seq_len: int, world_size: int) -> Tensor:
    """bool [S, S] in sequence order: what their kernels attend, by the rules of their index kernels.

    A slash marks the blocks that it touches in the last row of blocks; they repeat along diagonals. Of the columns the
    last slot is never reached and a place belongs to rank place // (S / W); where a column's block pair is not active,
    all of the query block attends it.
    """
    last_row = torch.zeros(seq_len // BLOCK, dtype=torch.bool)
    for slash in indices.slashes[0, head].tolist():
        last_row[(seq_len - BLOCK - slash) // BLOCK : (seq_len - 1 - slash) // BLOCK + 1] = True
    token = torch.arange(seq_len)
    block = token // BLOCK
    distance = block[:, None] - block[None, :]
    active = (distance >= 0) & last_row.flip(0)[distance.clamp(min=0)]
    attended = active & (token[None, :] <= token[:, None])
    for place in indices.columns[0, head].tolist()[:-1]:
        if place < seq_len:
            rank, rest = divmod(place, seq_len // world_size)
            key = (rest // BLOCK * world_size + rank) * BLOCK + rest % BLOCK
            attended[:, key] |= (block >= key // BLOCK) & ~active[:, key]
    return attended


@pytest.mark.parametrize(
    ("world_size", "columns", "density"), [(2, 0, 0.3), (2, 127, 0.3), (2, 128, 0.1), (4, 300, 0.2)]
)
def test_the_same_pairs_are_attended(world_size: int, columns: int, density: float) -> None:
    seq_len = 2 * world_size**2 * BLOCK
    mask = slash_mask(seq_len, density, columns, heads=3, seed=world_size)
    indices = peer_indices(mask, world_size)
    assert indices.slashes.shape[2] % 128 == 0  # read by so many at once
    positions = torch.arange(seq_len)
    for head in range(mask.heads):
        covered = covered_pairs(indices, head, seq_len=seq_len, world_size=world_size)
        assert torch.equal(covered, whole(mask, head, positions, positions))


def test_empty_slots_of_a_head_stay_empty_and_at_the_end() -> None:
    mask = slash_mask(2048, 0.2, 4, heads=2)
    columns = torch.tensor([[5, 130, 2048, 2048], [0, 127, 128, 2047]], dtype=torch.int32)
    found = peer_indices(replace(mask, columns=columns), 4).columns[0]
    assert found.dtype == torch.int32 and found.shape == (2, 128)
    # Rank 1 begins at place 512 with block 1; the last token is rank 3's last.
    assert found[0, :3].tolist() == [5, 514, 2048] and found[1, :5].tolist() == [0, 127, 512, 2047, 2048]
    assert (found.diff(dim=1) >= 0).all()


def test_places_are_those_of_the_striped_placement() -> None:
    mask = replace(slash_mask(2048, 0.2, 1, heads=1), columns=torch.arange(0, 2048, 7, dtype=torch.int32)[None])
    order = striped(seq_len_tokens=2048, world_size=4, granularity_tokens=BLOCK).permutation()
    places = peer_indices(mask, 4).columns[0, 0]
    tokens = torch.from_numpy(order)[places[places < 2048].long()]
    assert tokens.sort().values.tolist() == list(range(0, 2048, 7))


def test_what_they_would_compute_otherwise_is_refused() -> None:
    mask = slash_mask(2048, 0.2, 16, heads=2)
    active = mask.active.clone()
    active[1, 0] = False
    refused = [
        (replace(mask, active=active, own_blocks=None), "own blocks"),
        (slash_mask(2048, 0.2, 16, heads=2, block=64), "blocks are 128"),
        (slash_mask(2048 + 128, 0.2, 16, heads=2), "multiple of 2048"),
        (moba_like_mask(2048, 0.2, heads=2), "slashes and columns only"),
        (documents_mask(2048, 0.2, heads=2), "slashes and columns only"),
    ]
    for one, why in refused:
        with pytest.raises(UnsupportedError, match=why) as error:
            peer_indices(one, 4)
        assert isinstance(error.value, InputError)


def test_a_missing_folder_is_one_line_and_nothing_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--baselines", "mtraining-striped", "--mtraining", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["ring", *arguments])
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(ring, "start_ranks", None)  # nothing to start with
    with pytest.raises(SystemExit) as ended:
        ring.main()
    assert ended.value.code == f"--mtraining: {tmp_path}/minference/dist_ops/minfer_dr_striped.py is missing"
    assert capsys.readouterr() == ("", "")  # Python prints the code, and exits with 1


def test_what_arguments_lack_is_said(tmp_path: Path) -> None:
    theirs = ["dense-zigzag", "mtraining-striped"]
    assert "need GPUs" in (refusal(theirs, ["slash"], tmp_path, toy=True) or "")
    assert "--family slash" in (refusal(theirs, ["moba"], tmp_path, toy=False) or "")
    assert "need --mtraining" in (refusal(theirs, ["slash"], None, toy=False) or "")
    assert refusal(theirs[:1], ["moba"], None, toy=True) is None
    package = tmp_path / "minference" / "dist_ops"
    package.mkdir(parents=True)
    (package / "minfer_dr_striped.py").touch()
    assert "minfer_striped.py is missing" in (refusal(theirs, ["slash"], tmp_path, toy=False) or "")
    (package / "minfer_striped.py").touch()
    assert refusal(theirs, ["slash"], tmp_path, toy=False) is None
