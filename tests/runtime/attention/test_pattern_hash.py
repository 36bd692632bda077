"""The hash by which ranks agree on patterns: it must see what a mistake in replaying or choosing would change."""

from __future__ import annotations

import pytest
import torch

from sparsering.kernels.hashing import hashed_sum, words_of
from sparsering.kernels.mask import AttentionMask
from sparsering.kernels.triton.hashing import launch_hashed_sum
from sparsering.runtime.attention.masks import RunningHash, pattern_hash

BLOCKS = 128


def mask_of(*heads: tuple[int, ...], columns: list[list[int]] | None = None) -> AttentionMask:
    active = torch.zeros(len(heads), BLOCKS, dtype=torch.bool)
    for head, diagonals in enumerate(heads):
        active[head, list(diagonals)] = True
    return AttentionMask(
        seq_len_tokens=64 * BLOCKS,
        block_size=64,
        active=active,
        columns=None if columns is None else torch.tensor(columns, dtype=torch.int32),
    )


NEAR, FAR = mask_of((0, 8), (0, 8)), mask_of((0, 16), (0, 16))


@pytest.mark.parametrize(
    ("left", "right"),
    [
        pytest.param([mask_of((0, 8), (0, 16))], [mask_of((0, 16), (0, 8))], id="heads swapped"),
        pytest.param([NEAR, FAR], [FAR, NEAR], id="layers swapped"),
        pytest.param([mask_of((0, 8, 48))], [mask_of((0, 24, 32))], id="two diagonals moved, one up and one down"),
        pytest.param(
            [mask_of((0,), (0,), columns=[[1, 2, 3, 4], [1, 2, 7, 8]])],
            [mask_of((0,), (0,), columns=[[1, 2, 7, 8], [1, 2, 3, 4]])],
            id="columns of two heads swapped",
        ),
    ],
)
def test_masks_that_differ_have_other_hashes(left: list[AttentionMask], right: list[AttentionMask]) -> None:
    assert pattern_hash(left) != pattern_hash(right)


def test_masks_noted_at_once_or_in_turn_hash_alike_on_every_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    def taken(masks: list[AttentionMask]) -> int:
        running = RunningHash(torch.device("cpu"))
        for mask in masks:
            running.note(mask)
        return int(running.take())

    assert taken([NEAR, FAR]) == taken([NEAR, FAR]) != taken([FAR, NEAR])
    monkeypatch.setattr("sparsering.runtime.attention.masks.NOTED_BYTES", 0)  # every mask by itself
    assert taken([NEAR, FAR]) == taken([NEAR, FAR]) != taken([FAR, NEAR])


@pytest.mark.parametrize("words", [1, 5, 4096, 9000])
def test_the_launch_and_torch_give_the_same_sum(words: int) -> None:
    generator = torch.Generator().manual_seed(words)
    drawn = torch.randint(-(1 << 62), 1 << 62, (words,), generator=generator)
    drawn[0] = -(1 << 63)
    for first in (1, 1 << 40):
        assert launch_hashed_sum(drawn, first) == hashed_sum(drawn, first)


def test_bytes_that_are_no_whole_words_or_begin_within_one_are_hashed_too() -> None:
    data = torch.arange(1, 30, dtype=torch.uint8)
    known = {int(hashed_sum(words_of(data[begin:end]), 1)) for begin in range(9) for end in range(20, 30)}
    assert len(known) == 90
    assert int(hashed_sum(words_of(data[3:11]), 1)) == int(hashed_sum(words_of(data[3:11].clone()), 1))
