"""The flash4 backend without a GPU: its tables in Triton's interpreter against the mask, and what it refuses."""

from __future__ import annotations

import importlib.util
import sys
from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import flash4_contract

pytest.importorskip("triton")
import kernel_calls as calls
from sparsering.kernels import api
from sparsering.kernels.flash4 import index as flash4_index
from sparsering.kernels.flash4 import launch as flash4_launch
from sparsering.kernels.flash4.fold import (
    PROGRAMS_PER_MULTIPROCESSOR,
    TILES_TOGETHER,
    end_to_end,
    heads_apart,
    heads_together,
    lay_queries,
)
from sparsering.kernels.flash4.index import Flash4Task, flash4_task, head_groups
from sparsering.kernels.flash4.merge import merge_part
from sparsering.kernels.mask import AttentionMask, active_block_pairs, allowed_pairs, block_part
from sparsering.kernels.merge import merge
from sparsering.planner.cost import memory

BLOCK = 16
interpreted = pytest.mark.skipif(
    torch.cuda.is_available(),
    reason="the interpreter is for machines without a GPU; see test_gpu_kernels.py",
)


def mask_of(seq_len: int, *, toeplitz: bool, documents: bool = False, heads: int = 3) -> AttentionMask:
    generator = torch.Generator().manual_seed(seq_len)
    blocks = -(-seq_len // BLOCK)
    active = torch.rand((heads, blocks) if toeplitz else (heads, blocks, blocks), generator=generator) < 0.5
    active[0] = False
    starts = (torch.arange(seq_len) // 40).int() if documents else None
    return AttentionMask(seq_len_tokens=seq_len, block_size=BLOCK, active=active, documents=starts)


def positions(blocks: list[int]) -> torch.Tensor:
    return torch.cat([torch.arange(b * BLOCK, (b + 1) * BLOCK) for b in blocks])


def attended(task: Flash4Task, first: int, last: int, *, transposed: bool) -> torch.Tensor:
    """bool [H, S_q, S_k] that the tables say: full tiles whole, partial ones by causality and documents."""
    tables = task.tables(first, last, transposed=transposed)
    mask, q_side, k_side = task.task.mask, task.task.q_side, task.task.k_side
    found = torch.zeros(last - first, q_side.tokens, k_side.tokens, dtype=torch.int32)
    allowed = allowed_pairs(mask, *(tokens_of(side.blocks) for side in (q_side, k_side)))
    for counts, tiles, whole in (
        (tables.full_counts, tables.full_tiles, True),
        (tables.partial_counts, tables.partial_tiles, False),
    ):
        for head in range(last - first):
            for row in range(counts.shape[2]):
                listed = tiles[0, head, row, : counts[0, head, row]].tolist()
                assert listed == sorted(set(listed)), "ascending: the ragged tile comes last, which the wheels rely on"
                for tile in listed:
                    q_tile, k_tile = (tile, row) if transposed else (row, tile)
                    area = (slice(q_tile * BLOCK, (q_tile + 1) * BLOCK), slice(k_tile * BLOCK, (k_tile + 1) * BLOCK))
                    found[head][area] += 1 if whole else allowed[area].int()
    assert found.max() <= 1
    return found.bool()


def tokens_of(blocks: object) -> torch.Tensor:
    return positions([int(b) for b in blocks])  # type: ignore[attr-defined]


PLACEMENTS = {
    "whole": (list(range(12)), list(range(12))),
    "striped": ([1, 5, 9, 13], [2, 6, 10, 14]),
    "striped own": ([3, 7, 11], [3, 7, 11]),
    "later keys": ([0, 1], [5, 6, 7]),
    "gathered with own": ([2, 6, 10], [0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11]),
    "gathered zigzag": ([0, 1, 14, 15], [4, 5, 10, 11, 2, 3, 12, 13]),
}


@interpreted
@pytest.mark.parametrize("documents", [False, True], ids=["one document", "documents"])
@pytest.mark.parametrize("toeplitz", [True, False], ids=["toeplitz", "block mask"])
@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("seq_len", [16 * BLOCK, 11 * BLOCK + 5])
def test_tables_say_what_the_mask_says(placement: str, toeplitz: bool, seq_len: int, documents: bool) -> None:
    q_positions, k_positions = (positions(blocks) for blocks in PLACEMENTS[placement])
    mask = mask_of(seq_len, toeplitz=toeplitz, documents=documents)
    task = flash4_task(mask, q_positions, k_positions)
    for head in range(mask.heads):
        expected = block_part(mask, head, q_positions, k_positions)
        valid = (slice(task.task.q_valid_tokens), slice(task.task.k_valid_tokens))
        for transposed in (False, True):
            ours = attended(task, 0, mask.heads, transposed=transposed)[head]
            ours_valid = ours[valid] & (k_positions[valid[1]] < seq_len)[None]
            assert torch.equal(ours_valid, expected[valid])
    if not documents:
        block_pairs = task.tables(0, mask.heads, transposed=False)
        counted = block_pairs.full_counts.sum() + block_pairs.partial_counts.sum()
        assert counted == sum(pairs(mask, head, *PLACEMENTS[placement]) for head in range(mask.heads))


def pairs(mask: AttentionMask, head: int, q_blocks: list[int], k_blocks: list[int]) -> int:
    """Active causal pairs of blocks inside the sequence."""
    q, k = torch.tensor(q_blocks)[:, None], torch.tensor(k_blocks)[None, :]
    return int((active_block_pairs(mask, head, q, k) & (k <= q) & (q < mask.blocks)).sum())


@interpreted
def test_groups_of_heads_hold_the_same_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    mask = mask_of(9 * BLOCK, toeplitz=True, heads=4)
    everything = positions(list(range(9)))
    whole = attended(flash4_task(mask, everything, everything), 0, 4, transposed=True)
    monkeypatch.setattr(flash4_index, "TABLE_BYTES", 0)
    task = flash4_task(mask, everything, everything)
    parts = [attended(task, first, first + 2, transposed=True) for first in (0, 2)]
    assert torch.equal(torch.cat(parts), whole)
    assert task.nbytes == 0, "tables of a group are not kept"


@interpreted
@pytest.mark.parametrize("documents", [False, True], ids=["one document", "documents"])
@pytest.mark.parametrize("fold", [2, 4])
def test_heads_end_to_end_have_the_tiles_of_all_of_them(fold: int, documents: bool) -> None:
    mask, (q_blocks, k_blocks) = mask_of(16 * BLOCK, toeplitz=True, documents=documents, heads=4), PLACEMENTS["whole"]
    task = flash4_task(mask, positions(q_blocks), positions(k_blocks))
    apart = task.tables(0, 4, transposed=True)
    together = task.tables(0, 4, transposed=True, fold=fold)
    for kind in ("full", "partial"):
        counts, tiles = getattr(apart, f"{kind}_counts")[0], getattr(apart, f"{kind}_tiles")[0]
        found_counts, found_tiles = getattr(together, f"{kind}_counts")[0], getattr(together, f"{kind}_tiles")[0]
        assert found_counts.shape == (4 // fold, len(k_blocks))
        for row in range(len(k_blocks)):
            for number in range(4 // fold):
                heads = [number * fold + member for member in range(fold)]
                listed = [tiles[head, row, : counts[head, row]] for head in heads]
                expected = torch.cat([part + member * len(q_blocks) for member, part in enumerate(listed)])
                assert found_counts[number, row] == len(expected)
                assert torch.equal(found_tiles[number, row, : len(expected)], expected)


@interpreted
@pytest.mark.parametrize("tokens", [96, 85])
def test_rows_laid_end_to_end_come_back(tokens: int) -> None:
    generator = torch.Generator().manual_seed(0)
    q, grad_out = torch.randn(2, 2, tokens, 8, 16, generator=generator).half()
    lse, grad_lse = torch.randn(2, 2, 8, tokens, generator=generator)
    laid = lay_queries(q, grad_out, lse, grad_lse, tokens=96)
    for first, last, together in ((0, 8, 4), (4, 8, 4), (2, 4, 2), (0, 8, 1)):
        rows_and_values = end_to_end(laid, slice(first, last), together)
        for found, right in zip(rows_and_values[:2], (q, grad_out), strict=True):
            assert found.shape == (2, together * 96, (last - first) // together, 16)
            assert torch.equal(heads_apart(found, together=together, tokens=tokens), right[:, :, first:last])
            assert not heads_apart(found, together=together, tokens=96)[:, tokens:].any()
        for found, right in zip(rows_and_values[2:], (lse, grad_lse), strict=True):
            assert found.shape == (2, (last - first) // together, together * 96)
            assert torch.equal(found.reshape(2, last - first, 96)[:, :, :tokens], right[:, first:last])


# valid_tokens, batch, wanted programs, heads_a_launch, heads together
SPLITS = [
    (384, 1, 4, 8, 4),
    (300, 2, 4, 8, 4),
    (300, 2, 20, 8, 2),
    (300, 1, 12, 8, 2),
    (300, 1, 25, 8, 1),
    (384, 1, 3, 4, 4),
    (300, 2, 3, 2, 2),
]


@pytest.fixture
def contract(monkeypatch: pytest.MonkeyPatch) -> None:
    """flash4_contract.py in the place of the wheels and of a GPU with one multiprocessor."""
    monkeypatch.setattr(flash4_launch, "wheels", lambda: (flash4_contract, flash4_contract))
    for name in ("own_block_mask", "documents_mask"):
        monkeypatch.setattr(flash4_launch, name, getattr(flash4_contract, name))
    monkeypatch.setattr(flash4_launch, "_multiprocessors", lambda device: 1)


@interpreted
@pytest.mark.usefixtures("contract")
@pytest.mark.parametrize(
    ("valid_tokens", "batch", "wanted", "heads_a_launch", "together", "rounded", "documents"),
    [
        (*split, rounded, rounded != bool(number % 2))
        for number, split in enumerate(SPLITS)
        for rounded in (False, True)
    ],
)
def test_gradients_of_heads_end_to_end(
    valid_tokens: int,
    batch: int,
    wanted: int,
    heads_a_launch: int,
    together: int,
    rounded: bool,
    documents: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The same keys twice, beside the reference. A sequence has 24 programs with a head each.

    Every split meets added and rounded gradients, and one document and several; these meet in half of the splits each,
    as documents change the tables alone, and rounding what becomes of the sums.
    """
    laid_heads = []

    def launch(q: Tensor, *given: Any, **named: Any) -> Any:
        laid_heads.append(q.shape[1] // 384)
        return flash4_contract._flash_attn_bwd(q, *given, **named)

    monkeypatch.setattr(flash4_launch, "wheels", lambda: (SimpleNamespace(_flash_attn_bwd=launch), flash4_contract))
    monkeypatch.setattr(flash4_launch, "PROGRAMS_PER_MULTIPROCESSOR", wanted)
    generator = torch.Generator().manual_seed(0)
    active = torch.rand(8, 3, 3, generator=generator) < 0.7
    active[0] = False
    starts = (torch.arange(384) // 100).int() if documents else None
    mask = AttentionMask(seq_len_tokens=valid_tokens, block_size=128, active=active, documents=starts)
    tokens = torch.arange(384)
    grad_out, q, k, v = (torch.randn(batch, 384, heads, 64, generator=generator).half() for heads in (8, 8, 2, 2))
    lse = torch.rand(batch, 8, 384, generator=generator) + 4
    lse[:, 0] = -torch.inf
    delta = torch.randn(batch, 8, 384, generator=generator)
    inputs = grad_out, q, k, v, lse, delta
    right = [torch.zeros_like(x, dtype=torch.float64) for x in (q, k, v)]
    index = api.block_index(mask, tokens, tokens, backend="reference")
    into = dict(zip(("grad_q", "grad_k", "grad_v"), right, strict=True))
    calls.block_backward(*(x.double() for x in inputs), index=index, scale=0.2, **into)
    kind = torch.float16 if rounded else torch.float32
    grads = [torch.full_like(x, torch.nan, dtype=dtype) for x, dtype in ((q, torch.float32), (k, kind), (v, kind))]
    final_q = torch.full_like(q, torch.nan)
    scratch: dict[str, Any] = {}
    task = flash4_task(mask, tokens, tokens)
    table_bytes = task.table_bytes_of_a_head(transposed=True)
    monkeypatch.setattr(flash4_index, "LAUNCH_TABLE_BYTES", heads_a_launch * table_bytes)
    for last in (False, True):
        calls.block_backward(
            *inputs, api.BlockIndex(backend="flash4", data=task), scale=0.2, grad_q=grads[0], grad_k=grads[1],
            grad_v=grads[2], add_q=last, add_kv=last and not rounded, final_q=final_q if last else None,
            scratch=scratch,
        )  # fmt: skip
    assert laid_heads == [together if together > 1 else 0] * (2 * 8 // heads_a_launch)
    assert list(scratch) == ["laid"] * (together > 1)
    for found, expected, times in zip((final_q, *grads[1:]), right, (2, *[1 if rounded else 2] * 2), strict=True):
        torch.testing.assert_close(found.double(), expected * times, atol=2e-2, rtol=4e-3)


def test_as_many_heads_end_to_end_as_leave_enough_programs_and_tiles_in_the_cache() -> None:
    assert heads_together(group=8, lists=16 * 512, tiles=512, wanted=528) == 8
    assert heads_together(group=8, lists=16 * 256, tiles=512, wanted=528) == 4
    assert heads_together(group=8, lists=16 * 1024, tiles=1024, wanted=528) == 1
    assert heads_together(group=4, lists=16 * 1024, tiles=1024, wanted=528) == 4
    assert heads_together(group=8, lists=16, tiles=1, wanted=528) == 1
    assert heads_together(group=6, lists=4000, tiles=8, wanted=1000) == 3
    assert heads_together(group=1, lists=1 << 20, tiles=512, wanted=528) == 1
    assert memory.PROGRAMS_WANTED == 132 * PROGRAMS_PER_MULTIPROCESSOR  # an H100's and an H200's multiprocessors
    assert memory.TILES_TOGETHER == TILES_TOGETHER
    for group, lists, tiles in product((1, 3, 4, 8), (10, 500, 2000, 5000, 100_000), (1, 500, 2000, 5000)):
        given = {"group": group, "lists": lists, "tiles": tiles}
        counted = memory.heads_together(**given)
        assert heads_together(**given, wanted=memory.PROGRAMS_WANTED) == counted, "the planner counts what is held"


def test_groups_of_heads_stay_within_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flash4_index, "LAUNCH_TABLE_BYTES", 100)
    assert head_groups(16, 8, 1) == [(0, 16)]
    assert head_groups(16, 8, 10) == [(0, 8), (8, 16)]  # ten would fit, but split a KV head unevenly
    assert head_groups(16, 8, 20) == [(first, first + 4) for first in range(0, 16, 4)]
    assert head_groups(3, 3, 1000) == [(0, 1), (1, 2), (2, 3)]  # one head's tables may exceed it
    assert head_groups(12, 2, 15) == [(0, 6), (6, 12)]


@interpreted
@pytest.mark.parametrize("valid", [5, 40, 70])
@pytest.mark.parametrize("earlier", [False, True])
def test_merged_in_one_pass(valid: int, earlier: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    part = torch.randn(2, valid, 3, 16, generator=generator), torch.randn(2, 3, valid, generator=generator)
    before = torch.randn(2, 70, 3, 16, generator=generator), torch.randn(2, 3, 70, generator=generator)
    part[1][:, 0, ::2] = before[1][:, 0] = -torch.inf
    part[0].transpose(1, 2)[part[1] == -torch.inf] = 0
    before[0][:, :, 0] = 0
    padded = torch.zeros(2, 70, 3, 16), torch.full((2, 3, 70), -torch.inf)
    padded[0][:, :valid], padded[1][:, :, :valid] = part
    expected = merge(*before, *padded) if earlier else padded
    given = tuple(x.clone() for x in before)
    out, lse = merge_part(part, (given[0], given[1]) if earlier else None, tokens=70, out_dtype=torch.float32)
    assert out.data_ptr() == given[0].data_ptr() or not earlier
    torch.testing.assert_close(out, expected[0], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(lse, expected[1], atol=1e-6, rtol=1e-6)


def test_missing_wheels_are_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    from sparsering.kernels.flash4 import launch as flash4_launch

    flash4_launch.wheels.cache_clear()
    if importlib.util.find_spec("flash_attn") is not None:
        monkeypatch.setitem(sys.modules, "flash_attn", None)
    mask = AttentionMask(seq_len_tokens=128, block_size=128, active=torch.ones(1, 1, dtype=torch.bool))
    tokens = torch.arange(128)
    with pytest.raises(
        ValueError, match=r"flash4: the flash-attn-4 wheels cannot be imported .*sparsering\[flash4\]"
    ) as e:
        api.block_index(mask, tokens, tokens, backend="flash4")
    assert "\n" not in str(e.value)
    flash4_launch.wheels.cache_clear()


def test_other_blocks_are_refused_first() -> None:
    mask = AttentionMask(seq_len_tokens=128, block_size=64, active=torch.ones(1, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"mask.block_size: 64 is not 128 \(flash4 backend\)"):
        api.block_index(mask, torch.arange(128), torch.arange(128), backend="flash4")
