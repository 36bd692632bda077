"""Sliding windows that are exact to the token, in patterns: against the definition, and what is refused."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsering.traces.errors import InputError
from sparsering.traces.pattern import (
    MOST_EDGES,
    BlockMask,
    HeadPattern,
    LayerPattern,
    VerticalSlash,
    element_mask,
    has_windows,
    window_diagonals,
    windowed,
)
from sparsering.traces.stats import block_overlap

BLOCK, BLOCKS, TOKENS = 4, 6, 23  # the last block is ragged


def layer(*heads: HeadPattern, tokens: int = TOKENS, block: int = BLOCK, documents: Any = None) -> LayerPattern:
    return LayerPattern(seq_len_tokens=tokens, block_size=block, heads=heads, documents=documents)


def window(tokens: int, diagonals: Sequence[int] = (), **others: Any) -> VerticalSlash:
    return windowed(tokens, block_size=BLOCK, blocks=BLOCKS, diagonals=diagonals, **others)


@pytest.mark.parametrize("block", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("blocks", range(1, 6))
def test_diagonals_are_told_apart_by_the_distances_that_they_hold(block: int, blocks: int) -> None:
    for tokens in range(block * (blocks + 2)):
        whole, edges = window_diagonals(tokens, block, blocks)
        inside, across = [], []
        for diagonal in range(blocks):
            queries = range(diagonal * block, (diagonal + 1) * block)
            distances = [query - key for query in queries for key in range(block)]
            if max(distances) < tokens:
                inside.append(diagonal)
            elif min(distances) < tokens and tokens:
                across.append(diagonal)
        assert (whole.tolist(), edges.tolist()) == (inside, across)
        assert len(across) <= MOST_EDGES and whole.dtype == edges.dtype == np.int32


@pytest.mark.parametrize("tokens", [1, 7, 16, 23])
@pytest.mark.parametrize("block", [1, 2, 3, 4, 7, 16])
def test_windows_of_all_lengths_attend_what_they_say_and_compute_no_other_blocks(tokens: int, block: int) -> None:
    distance = np.subtract.outer(np.arange(tokens), np.arange(tokens))
    blocks = -(-tokens // block)
    for size in range(tokens + block + 2):
        head = windowed(size, block_size=block, blocks=blocks)
        near = (distance >= 0) & (distance < size)
        assert (element_mask(layer(head, tokens=tokens, block=block), 0) == near).all()
        reached = np.zeros((blocks, blocks), dtype=bool)
        queries, keys = np.nonzero(near)
        reached[queries // block, keys // block] = True
        assert not (reached & ~head.block_bits(blocks)).any()
        longest = np.subtract.outer(np.arange(blocks * block), np.arange(blocks * block))
        queries, keys = np.nonzero((longest >= 0) & (longest < size))
        assert sorted(set((queries // block - keys // block).tolist())) == head.diagonals.tolist()


@given(st.data())
def test_the_mask_is_the_definition(data: st.DataObject) -> None:
    tokens, block = data.draw(st.integers(1, 50)), data.draw(st.sampled_from([1, 2, 3, 4, 7, 16]))
    blocks = -(-tokens // block)
    size = data.draw(st.integers(0, 60))
    diagonals = sorted(data.draw(st.sets(st.integers(0, blocks - 1), max_size=3)))
    columns = sorted(data.draw(st.sets(st.integers(0, tokens - 1), max_size=3)))
    documents = np.sort(data.draw(st.lists(st.integers(0, 2), min_size=tokens, max_size=tokens)))
    head = windowed(size, block_size=block, blocks=blocks, columns=columns, diagonals=diagonals)
    found = element_mask(layer(head, tokens=tokens, block=block, documents=documents), 0)
    for query in range(tokens):
        for key in range(tokens):
            near = 0 <= query - key < size
            chosen = query // block - key // block in diagonals or key in columns
            allowed = key <= query and documents[query] == documents[key] and (near or chosen)
            assert found[query, key] == allowed
    computed = head.block_bits(blocks)[np.arange(tokens)[:, None] // block, np.arange(tokens)[None, :] // block]
    assert not (found & ~computed)[:, [key for key in range(tokens) if key not in columns]].any()


def test_the_normal_form() -> None:
    head = window(6, [2, 5], columns=[3, 1])
    assert (head.columns.tolist(), head.diagonals.tolist(), head.cut.tolist()) == ([1, 3], [0, 1, 2, 5], [1])
    assert (head.window_tokens, head.whole.tolist()) == (6, [0, 2, 5])
    none = window(0)
    assert (none.window_tokens, none.diagonals.size, none.cut.size) == (0, 0, 0)
    beyond, all_of_it = window(1 << 30), window(BLOCKS * BLOCK)
    assert beyond.window_tokens == all_of_it.window_tokens == BLOCKS * BLOCK
    assert beyond.diagonals.tolist() == list(range(BLOCKS)) and not beyond.cut.size
    assert not head.cut.flags.writeable


def test_cut_blocks_count_as_whole_ones() -> None:
    head = window(6)
    assert head.count_active_blocks(BLOCKS) == 6 + 5 + 4 == int(np.tril(head.block_bits(BLOCKS)).sum())
    assert layer(head).density == pytest.approx(15 / 21)


def test_block_masks_have_no_window() -> None:
    mask = BlockMask(bits=np.eye(BLOCKS, dtype=bool))
    assert mask.window_tokens == 0 and mask.cut.size == 0 and mask.cut.dtype == np.int32
    assert not has_windows(layer(mask)) and has_windows(layer(mask, window(1)))


def head(diagonals: Sequence[int], tokens: Any, cut: Sequence[int] = ()) -> VerticalSlash:
    return VerticalSlash(
        columns=np.zeros(0, np.int32), diagonals=np.array(diagonals), window_tokens=tokens, cut=np.array(cut, int)
    )


REFUSALS: dict[str, Callable[[], HeadPattern]] = {
    "window_tokens: must be from 0 to 2147483647, not -1": lambda: head([0], -1),
    "window_tokens: must be a whole number, not 1.5": lambda: head([0], 1.5),
    "window_tokens: must be a whole number, not True": lambda: head([0], True),
    "window_tokens: head 1 has 25, which 6 blocks of 4 do not hold": lambda: head(range(6), 25),
    "cut: head 1 has 1, which is none of its diagonals": lambda: head([0, 2], 6, [1]),
    "cut: head 1 has 0, which the edge of a window of 6 tokens does not cross": lambda: head([0, 1, 2], 6, [0]),
    "cut: head 1 has 1, but no window": lambda: head([0, 1, 2], 0, [1]),
    "cut: must not repeat": lambda: head([0, 1, 2], 6, [1, 1]),
    "diagonals: head 1 lacks 0, which a window of 6 tokens reaches": lambda: head([1, 2], 6, [1]),
    "diagonals: head 1 lacks 2, which a window of 6 tokens reaches": lambda: head([0, 1], 6, [1]),
}


@pytest.mark.parametrize("message", list(REFUSALS))
def test_a_window_that_cannot_be(message: str) -> None:
    with pytest.raises(InputError) as caught:
        layer(window(6), REFUSALS[message]())
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


def test_heads_that_differ_in_a_window_alone_are_not_alike() -> None:
    """Blocks that are cut are shared only by heads whose windows are the same."""
    six, seven, whole = window(6), window(7), window(6, [1, 2])
    assert six.diagonals.tolist() == seven.diagonals.tolist() == whole.diagonals.tolist() == [0, 1, 2]
    assert block_overlap(six, window(6), BLOCKS) == 1
    assert block_overlap(six, seven, BLOCKS) == pytest.approx(6 / 15)
    assert block_overlap(six, whole, BLOCKS) == pytest.approx(6 / 15)
    listed = BlockMask(bits=six.block_bits(BLOCKS))
    assert block_overlap(six, listed, BLOCKS) == block_overlap(listed, six, BLOCKS) == pytest.approx(6 / 15)
    assert block_overlap(whole, listed, BLOCKS) == 1
