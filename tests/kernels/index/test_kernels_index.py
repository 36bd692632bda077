"""The Triton indexes, read back in plain Python and compared with the mask itself. No GPU, no Triton."""

from __future__ import annotations

from dataclasses import replace
from itertools import groupby

import numpy as np
import pytest
import torch

from sparsering.kernels.index.block import BlockTask, TileLists, block_task
from sparsering.kernels.index.device_lists import periodic_kernel
from sparsering.kernels.index.periodic import SECTIONS, periodic_tables, sections_of
from sparsering.kernels.jit import run
from sparsering.kernels.mask import AttentionMask
from sparsering.planner.schedule.pairs import documents_share

BLOCK = 16


def mask_of(
    seq_len: int, *, toeplitz: bool, heads: int = 3, density: float = 0.5, seed: int = 0, columns: int = 0
) -> AttentionMask:
    generator = torch.Generator().manual_seed(seed)
    blocks = -(-seq_len // BLOCK)
    active = torch.rand((heads, blocks) if toeplitz else (heads, blocks, blocks), generator=generator) < density
    active[0] = False
    chosen = (
        torch.stack(
            [torch.sort(torch.randperm(seq_len, generator=generator)[:columns]).values for _ in range(heads)]
        ).int()
        if columns
        else None
    )
    return AttentionMask(seq_len_tokens=seq_len, block_size=BLOCK, active=active, columns=chosen)


def positions(blocks: list[int], tail: int = BLOCK) -> torch.Tensor:
    tokens = torch.cat([torch.arange(b * BLOCK, (b + 1) * BLOCK) for b in blocks])
    return tokens[: len(tokens) - BLOCK + tail]


def pairs_of(lists: TileLists, *, transposed: bool) -> set[tuple[int, int, int]]:
    """(head, query tile, key tile) of every list entry and diagonal; each must be listed once."""
    found = []
    for head in range(lists.rows.shape[0]):
        for row in range(lists.rows.shape[1]):
            start, count, base, diagonal = lists.rows[head, row].tolist()
            tiles = [base + lists.sign * int(e) for e in lists.entries[start : start + count]]
            found += [
                (head, tile, row) if transposed else (head, row, tile)
                for tile in tiles + ([diagonal] if diagonal >= 0 else [])
            ]
    assert len(found) == len(set(found))
    return set(found)


def pairs_by_definition(mask: AttentionMask, q_blocks: list[int], k_blocks: list[int]) -> set[tuple[int, int, int]]:
    def active(head: int, i: int, j: int) -> bool:
        return bool(mask.active[head, i - j] if mask.is_toeplitz else mask.active[head, i, j])

    return {
        (head, row, tile)
        for head in range(mask.heads)
        for row, i in enumerate(q_blocks)
        for tile, j in enumerate(k_blocks)
        if j <= i < mask.blocks and active(head, i, j)
    }


PLACEMENTS = {
    "whole": (list(range(12)), list(range(12))),
    "striped": ([1, 5, 9, 13], [2, 6, 10, 14]),
    "striped own": ([3, 7, 11], [3, 7, 11]),
    "earlier keys": ([8, 9, 10, 11], [0, 1, 2, 3]),
    "later keys": ([0, 1], [5, 6, 7]),
    "zigzag": ([0, 1, 14, 15], [2, 3, 12, 13]),
    "mixed strides": ([0, 3, 6, 9], [1, 2, 3, 4, 5]),
    "one tile": ([7], [2]),
    "gathered": ([1, 5, 9, 13], [0, 4, 8, 12, 3, 7, 11, 15, 2, 6, 10, 14]),
    "gathered with own": ([2, 6, 10], [0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11]),
    "gathered, two ranks of three": ([1, 4, 7, 10], [0, 3, 6, 9, 2, 5, 8, 11]),
    "gathered, too short": ([1, 5, 9, 13], [0, 4, 8, 2, 6, 10, 14]),
    "pairs of blocks": ([2, 3, 10, 11], [4, 5, 12, 13]),
    "pairs of blocks, own": ([2, 3, 10, 11], [2, 3, 10, 11]),
    "pairs of blocks, gathered": ([2, 3, 10, 11], [0, 1, 8, 9, 6, 7, 14, 15, 4, 5, 12, 13]),
    "triples, gathered with own": (
        [3, 4, 5, 12, 13, 14],
        [6, 7, 8, 15, 16, 17, 3, 4, 5, 12, 13, 14, 0, 1, 2, 9, 10, 11],
    ),
    "one stripe each": ([0, 1, 2, 3, 4, 5, 6, 7], [8, 9, 10, 11, 12, 13, 14, 15]),
    "gathered stretches": ([12, 13, 14, 15], [0, 1, 2, 3, 8, 9, 10, 11, 4, 5, 6, 7]),
    "gathered zigzag": ([0, 1, 14, 15], [4, 5, 10, 11, 2, 3, 12, 13]),
}


@pytest.mark.parametrize("toeplitz", [True, False], ids=["toeplitz", "csr"])
@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("seq_len", [16 * BLOCK, 11 * BLOCK + 5])
def test_lists_hold_exactly_the_active_pairs(placement: str, toeplitz: bool, seq_len: int) -> None:
    q_blocks, k_blocks = PLACEMENTS[placement]
    mask = mask_of(seq_len, toeplitz=toeplitz)
    task = block_task(mask, positions(q_blocks), positions(k_blocks))
    expected = pairs_by_definition(mask, q_blocks, k_blocks)
    assert pairs_of(task.queries, transposed=False) == expected
    assert pairs_of(task.keys, transposed=True) == expected


@pytest.mark.parametrize("toeplitz", [True, False], ids=["toeplitz", "csr"])
@pytest.mark.parametrize(
    "placement", ["striped own", "zigzag", "gathered with own", "pairs of blocks, gathered", "gathered zigzag"]
)
def test_blocks_of_other_documents_are_not_visited(placement: str, toeplitz: bool) -> None:
    """Documents of less than a block and of several, with their ends inside of blocks and between two."""
    seq_len = 14 * BLOCK + 5
    q_blocks, k_blocks = PLACEMENTS[placement]
    lengths = torch.tensor([5, 7, 3 * BLOCK + 4, BLOCK, 2 * BLOCK, 4 * BLOCK - 1, 20 * BLOCK])
    documents = torch.repeat_interleave(torch.arange(7), lengths)[: 16 * BLOCK].int()
    mask = replace(mask_of(seq_len, toeplitz=toeplitz), documents=documents)
    shared = documents_share(documents.numpy(), BLOCK, seq_len, np.tri(mask.blocks, dtype=bool))
    task = block_task(mask, positions(q_blocks), positions(k_blocks))
    expected = {
        (head, row, tile)
        for head, row, tile in pairs_by_definition(mask, q_blocks, k_blocks)
        if shared[q_blocks[row], k_blocks[tile]]
    }
    assert pairs_of(task.queries, transposed=False) == expected
    assert pairs_of(task.keys, transposed=True) == expected


def test_documents_that_do_not_rise_leave_no_block_out() -> None:
    q_blocks, k_blocks = PLACEMENTS["striped own"]
    documents = (torch.arange(16 * BLOCK) // BLOCK % 2).int()
    mask = replace(mask_of(16 * BLOCK, toeplitz=True), documents=documents)
    task = block_task(mask, positions(q_blocks), positions(k_blocks))
    assert pairs_of(task.queries, transposed=False) == pairs_by_definition(mask, q_blocks, k_blocks)


def test_large_csr_indexes_are_counted_first(monkeypatch: pytest.MonkeyPatch) -> None:
    mask = mask_of(12 * BLOCK, toeplitz=False)
    everything = positions(list(range(12)))
    expected = pairs_of(block_task(mask, everything, everything).queries, transposed=False)
    monkeypatch.setattr("sparsering.kernels.index.device_lists.UNCOUNTED_LIMIT", 0)
    assert pairs_of(block_task(mask, everything, everything).queries, transposed=False) == expected


def test_long_rows_come_first() -> None:
    mask = mask_of(12 * BLOCK, toeplitz=True)
    everything = positions(list(range(12)))
    lists = block_task(mask, everything, everything).queries
    work = (lists.rows[:, :, 1] + (lists.rows[:, :, 3] >= 0)).sum(0)[lists.order.long()]
    assert sorted(lists.order.tolist()) == list(range(12))
    assert torch.equal(work, work.sort(descending=True).values)


def test_valid_tokens_of_a_ragged_shard() -> None:
    mask = mask_of(5 * BLOCK + 3, toeplitz=True)
    task: BlockTask = block_task(mask, positions([1, 3, 5, 7], tail=9), positions([0, 2, 4, 6]))
    assert (task.q_valid_tokens, task.k_valid_tokens) == (2 * BLOCK + 3, 3 * BLOCK)
    assert task.q_side.tokens == 3 * BLOCK + 9


@pytest.mark.parametrize(
    "tokens",
    [torch.arange(1, 33), torch.tensor([0, 2, 4]), torch.arange(16).repeat(2)],
    ids=["shifted", "token striped", "repeated"],
)
def test_tiles_that_are_no_blocks_are_refused(tokens: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="k_positions: local tokens are no ascending whole blocks of 16"):
        block_task(mask_of(64, toeplitz=True), torch.arange(16), tokens)


def test_index_at_512k_and_16_heads_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    # Few large programs: the interpreter's time goes by programs. The size of the index does not depend on them.
    monkeypatch.setattr("sparsering.kernels.index.device_lists._ROWS", 4096)
    monkeypatch.setattr("sparsering.kernels.index.device_lists._CHUNK", 4096)
    blocks = 4096
    active = torch.rand(16, blocks, generator=torch.Generator().manual_seed(0)) < 0.05
    mask = AttentionMask(seq_len_tokens=blocks * 128, block_size=128, active=active)
    everything = torch.arange(blocks * 128)
    assert block_task(mask, everything, everything).nbytes < 8 * 2**20


def test_striped_shards_need_no_list_per_row() -> None:
    """Stripes of several blocks, gathered from three ranks: entries per class of rows, not per row."""
    mask = mask_of(96 * BLOCK, toeplitz=True)
    shards = [[b for b in range(96) if b // 4 % 4 == rank] for rank in range(4)]
    task = block_task(mask, positions(shards[1]), positions(shards[0] + shards[3] + shards[2]))
    gathered = shards[0] + shards[3] + shards[2]
    assert len(task.queries.entries) == mask.heads * 4 * sum(range(4 + 1)) * (mask.blocks // 4)
    assert (sections_of(1), sections_of(2), sections_of(4), sections_of(8)) == (SECTIONS, SECTIONS // 2, 4, 4)
    assert pairs_of(task.queries, transposed=False) == pairs_by_definition(mask, shards[1], gathered)
    assert pairs_of(task.keys, transposed=True) == pairs_by_definition(mask, shards[1], gathered)


@pytest.mark.parametrize("chunk", [16, 1024])
def test_rows_visit_gathered_shards_one_after_the_other(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but the last diagonals of a row, shard by shard, nearest block first: see index_periodic.py."""
    monkeypatch.setattr("sparsering.kernels.index.device_lists._CHUNK", chunk)
    mask = mask_of(96 * BLOCK - 3, toeplitz=True)
    shards = [list(range(rank, 96, 4)) for rank in range(4)]
    gathered = shards[0] + shards[3] + shards[2]
    lists = block_task(mask, positions(shards[1]), positions(gathered)).queries
    assert pairs_of(lists, transposed=False) == pairs_by_definition(mask, shards[1], gathered)
    reach, moves = 96 // SECTIONS, 0
    for head in range(mask.heads):
        for row, query in enumerate(shards[1]):
            start, count, base, _ = lists.rows[head, row].tolist()
            keys = [gathered[base + int(entry)] for entry in lists.entries[start : start + count]]
            begun = query // reach * reach  # diagonals below are visited shard by shard
            whole = [key for key in keys if query - key < begun]
            assert whole == keys[: len(whole)] and keys[len(whole) :] == sorted(keys[len(whole) :], reverse=True)
            owners = [key % 4 for key in whole]
            assert [owner for owner, _ in groupby(owners)] == sorted(set(owners), key=[2, 3, 0].index)
            for owner in set(owners):
                of_owner = [key for key in whole if key % 4 == owner]
                assert of_owner == sorted(of_owner, reverse=True)
            moves += len(set(owners)) > 1
    assert moves > 20


@pytest.mark.parametrize("blocks", [7, 17, 33, 40, 132])
def test_nothing_is_read_or_written_beyond_the_tables(blocks: int) -> None:
    """Bytes after `active` and `present` are on, and numbers after `entries` and `before` stay what they are."""
    guard, heads, untouched = 4096, 2, -7

    def guarded(values: torch.Tensor) -> torch.Tensor:
        return torch.cat([values.flatten(), torch.ones(guard, dtype=values.dtype)])

    shards = [np.arange(rank, blocks, 3) for rank in range(3)]
    given = periodic_tables(
        shards[1], np.concatenate([shards[2], shards[0]]), blocks=blocks, transposed=False, device=torch.device("cpu")
    )
    assert given is not None and given.by_shard is not None
    sections = given.sections
    reach = -(-blocks // sections)
    room = sum(range(sections + 1)) * reach
    entries, before = (
        torch.full((heads * size + guard,), untouched, dtype=torch.int32) for size in (room, sections * (reach + 1))
    )
    active = torch.ones(heads, blocks, dtype=torch.uint8)
    run(
        periodic_kernel, (heads, sections),
        guarded(active), guarded(given.constant), guarded(given.present.to(torch.uint8)), guarded(given.by_shard),
        entries, before, 1, blocks, reach, room, SECTIONS=sections, CHUNK=256,
    )  # fmt: skip
    assert (entries[-guard:] == untouched).all() and (before[-guard:] == untouched).all()
    most = int(given.present.sum())
    assert before[:-guard].max() == most
    written = (entries[:-guard].view(heads, room) != untouched).sum(1)
    assert (written <= most * sections).all()
