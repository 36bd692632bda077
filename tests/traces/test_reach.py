"""How far patterns reach, beside the definition written out: every pair of tokens is looked at."""

from __future__ import annotations

import json
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from typer.testing import CliRunner

import tiny
from sparsering.cli import app
from sparsering.traces.blocks.mask import BlockMask
from sparsering.traces.dataset.manifest import ModelShape
from sparsering.traces.dataset.rows import HeadChoice
from sparsering.traces.dataset.writer import TraceWriter
from sparsering.traces.pattern import HeadPattern, LayerPattern, dense, element_mask, windowed
from sparsering.traces.reach import head_reaches, last_queries

BLOCK = 16


def _by_definition(pattern: LayerPattern, head: int, far: int) -> tuple[int, int]:
    """Return how many keys have a query more than `far` tokens behind them, and how many none of these attends."""
    attends, tokens = element_mask(pattern, head), pattern.seq_len_tokens
    keys = unreached = 0
    for key in range(tokens):
        document = None if pattern.documents is None else pattern.documents[key]
        queries = [
            query for query in range(key + far + 1, tokens)
            if document is None or key < pattern.anchor_tokens or pattern.documents[query] == document
        ]  # fmt: skip
        keys += bool(queries)
        unreached += bool(queries) and not attends[queries, key].any()
    return keys, unreached


def _head(draw: st.DrawFn, kind: str, blocks: int, tokens: int, anchors: int) -> HeadPattern:
    columns = sorted({*range(anchors), *draw(st.lists(st.integers(0, tokens - 1), max_size=6))})
    if kind == "mask":
        seed = draw(st.integers(0, 2**32 - 1))
        bits = np.tril(np.random.default_rng(seed).random((blocks, blocks)) < draw(st.sampled_from([0.0, 0.05, 0.4])))
        return BlockMask(bits=bits, columns=columns)
    diagonals = draw(st.lists(st.integers(0, blocks - 1), unique=True, max_size=4))
    window = draw(st.integers(0, 3 * BLOCK)) if kind == "window" else 0
    return windowed(window, block_size=BLOCK, blocks=blocks, columns=columns, diagonals=sorted(diagonals))


@st.composite
def patterns(draw: st.DrawFn) -> LayerPattern:
    """Layers of every kind of head; documents that begin anywhere; anchors in the first."""
    tokens = draw(st.integers(1, 150))
    blocks = -(-tokens // BLOCK)
    documents, anchors = None, 0
    if draw(st.booleans()):
        starts = draw(st.lists(st.integers(0, tokens - 1), max_size=6))
        documents = np.searchsorted(np.sort([*starts, 0]), np.arange(tokens), side="right").astype(np.int32)
        anchors = draw(st.integers(0, min(5, int((documents == documents[0]).sum()))))
    kinds = draw(st.lists(st.sampled_from(["mask", "slash", "window"]), min_size=1, max_size=3))
    heads = tuple(_head(draw, kind, blocks, tokens, anchors) for kind in kinds)
    return LayerPattern(
        seq_len_tokens=tokens, block_size=BLOCK, heads=heads, documents=documents, anchor_tokens=anchors
    )


@given(pattern=patterns(), far=st.sampled_from([0, 1, 15, 16, 17, 40, 100, 200]))
def test_reach_is_what_the_definition_says(pattern: LayerPattern, far: int) -> None:
    for head in range(pattern.num_heads):
        (reach,) = head_reaches(pattern, head, [far])
        assert (reach.keys, reach.unreached) == _by_definition(pattern, head, far)


@given(pattern=patterns())
def test_the_last_query_of_each_key(pattern: LayerPattern) -> None:
    for head in range(pattern.num_heads):
        attends = element_mask(pattern, head)
        queries = np.arange(pattern.seq_len_tokens)[:, None]
        wanted: NDArray[np.int64] = np.where(attends, queries, -1).max(axis=0)
        np.testing.assert_array_equal(last_queries(pattern, head), wanted)


def test_of_masks_with_several_strips() -> None:
    """More blocks than are looked at together, with documents that end within strips."""
    tokens, blocks = 16 * 150, 150
    bits = np.tril(np.random.default_rng(0).random((blocks, blocks)) < 0.02)
    documents = (np.arange(tokens) // 997).astype(np.int32)
    for one in (None, documents):
        heads = (BlockMask(bits=bits, columns=[5, 1200]),)
        pattern = LayerPattern(seq_len_tokens=tokens, block_size=16, heads=heads, documents=one)
        (reach,) = head_reaches(pattern, 0, [300])
        assert (reach.keys, reach.unreached) == _by_definition(pattern, 0, 300)
        assert 0 < reach.unreached < reach.keys


def test_dense_attention_reaches_all_and_a_window_none() -> None:
    tokens = 200
    window = windowed(20, block_size=16, blocks=13)
    pattern = LayerPattern(
        seq_len_tokens=tokens,
        block_size=16,
        heads=(*dense(seq_len_tokens=tokens, block_size=16, heads=1).heads, window),
    )
    assert [head_reaches(pattern, head, [50, 200])[0].share for head in range(2)] == [0.0, 1.0]
    assert head_reaches(pattern, 0, [200])[0].share is None  # nothing is that far


@pytest.fixture(scope="module")
def trace_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps, two layers, two heads: a window and a block mask that sees the first block alone."""
    folder, tokens, blocks = tmp_path_factory.mktemp("reach"), 320, 20
    shape = ModelShape(model_id="m", layers=2, heads=2, kv_heads=2, head_dim=8)
    header = tiny.trace_header(model=shape, recorded_layers=(0, 1), seq_len_tokens=tokens)
    bits = np.eye(blocks, dtype=bool)
    bits[:, 0] = True
    with TraceWriter(folder / "trace", header) as writer:
        for step, window in ((0, 16), (5, 320)):
            heads = (windowed(window, block_size=16, blocks=blocks), BlockMask(bits=bits))
            layer = LayerPattern(seq_len_tokens=tokens, block_size=16, heads=heads)
            writer.append(step, {one: (layer, [HeadChoice(selector="s")] * 2) for one in range(2)})
    return folder / "trace"


def _inspected(*arguments: object) -> str:
    done = CliRunner().invoke(app, ["inspect", *map(str, arguments)])
    assert done.exit_code == 0, done.output
    return done.stdout


def test_inspect_shows_it_for_every_step_layer_and_head(trace_folder: Path) -> None:
    found = json.loads(_inspected(trace_folder, "--reach", "--far", 100, "--far", 200, "--json"))["reach"]
    assert [(one["training_step"], one["layer"], one["far_tokens"]) for one in found] == [
        (step, layer, far) for step in (0, 5) for layer in (0, 1) for far in (100, 200)
    ]
    assert [one["keys"] for one in found[:2]] == [219, 119]
    assert found[0]["unreached_per_head"] == [1.0, pytest.approx(203 / 219)]  # all but the first block
    assert found[0]["unreached_mean"] == pytest.approx((1 + 203 / 219) / 2)
    assert found[4]["unreached_per_head"] == [0.0, pytest.approx(203 / 219)]
    assert "reach" not in json.loads(_inspected(trace_folder, "--json"))


def test_inspect_shows_it_in_tables(trace_folder: Path) -> None:
    told = _inspected(trace_folder, "--reach", "--far", 100)
    assert "96.3%" in told and "46.3%" in told  # means of the two steps
    assert "96.3%" not in _inspected(trace_folder)
    assert "–" in _inspected(trace_folder, "--reach")  # no key has a query 8192 tokens later


def test_far_goes_with_reach(trace_folder: Path) -> None:
    done = CliRunner().invoke(app, ["inspect", str(trace_folder), "--far", "100"])
    assert (done.exit_code, done.output) == (2, "sparsering: --far: goes with --reach\n")


def test_a_layer_of_half_a_million_tokens_takes_little_time_and_memory() -> None:
    tokens, blocks = 512 * 1024, 4096
    bits = np.zeros((blocks, blocks), dtype=bool)
    bits[np.arange(blocks), np.arange(blocks) // 2] = True
    listed, diagonals = (
        BlockMask(bits=bits),
        windowed(1024, block_size=128, blocks=blocks, diagonals=range(0, 4096, 64)),
    )
    pattern = LayerPattern(seq_len_tokens=tokens, block_size=128, heads=(listed, diagonals))
    began = time.monotonic()
    tracemalloc.start()
    shares = [[one.share for one in head_reaches(pattern, head)] for head in range(2)]
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 64 << 20
    assert time.monotonic() - began < 20
    assert [share is not None and 0 < share < 0.001 for share in shares[1]] == [True, True]  # a few at the end
    assert shares[0][0] is not None and 0.5 < shares[0][0] < 1
