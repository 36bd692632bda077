"""Traces on disk: what is written comes back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from sparsering.traces.blocks.triangle import pack_bits, unpack_bits
from sparsering.traces.dataset.manifest import ModelShape
from sparsering.traces.dataset.rows import HeadChoice
from sparsering.traces.dataset.store import Trace
from sparsering.traces.dataset.writer import TraceWriter
from sparsering.traces.pattern import BlockMask, LayerPattern, VerticalSlash


@st.composite
def layer_patterns(draw: st.DrawFn) -> LayerPattern:
    seq_len, block_size = draw(st.integers(1, 300)), draw(st.sampled_from([1, 7, 64, 128]))
    blocks = -(-seq_len // block_size)
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    heads: list[VerticalSlash | BlockMask] = []
    for _ in range(draw(st.integers(1, 4))):
        if draw(st.booleans()):
            heads.append(BlockMask(bits=np.tril(rng.random((blocks, blocks)) < draw(st.floats(0, 1)))))
            continue
        heads.append(
            tiny.slash(
                rng.choice(seq_len, draw(st.integers(0, seq_len)), replace=False),
                rng.choice(blocks, draw(st.integers(0, blocks)), replace=False),
            )
        )
    documents = np.sort(rng.integers(0, 4, seq_len)).astype(np.int32) if draw(st.booleans()) else None
    return LayerPattern(seq_len_tokens=seq_len, block_size=block_size, heads=tuple(heads), documents=documents)


@given(written=layer_patterns(), masses=st.tuples(st.none() | st.floats(0, 1), st.none() | st.floats(0, 1)))
@settings(max_examples=30)
def test_any_layer_comes_back(tmp_path_factory: pytest.TempPathFactory, written: LayerPattern, masses) -> None:
    choice = HeadChoice(
        selector="any", settings={"a": [1, "b"], "c": None}, kept_mass_probe=masses[0], kept_mass_sampled=masses[1]
    )
    shape = ModelShape(model_id="m", layers=8, heads=written.num_heads, kv_heads=1, head_dim=8)
    head = tiny.trace_header(
        model=shape, recorded_layers=(6,), seq_len_tokens=written.seq_len_tokens, block_size=written.block_size
    )
    folder = tmp_path_factory.mktemp("trace")
    with TraceWriter(folder, head) as writer:
        writer.append(11, {6: (written, [choice] * written.num_heads)})
    trace = Trace.open(folder)
    trace.verify()
    assert trace.header == head
    tiny.assert_same_layer(trace.layer_pattern(11, 6), written)
    for number, row in enumerate(trace.heads(11)):
        assert (row.training_step, row.layer, row.head, row.choice) == (11, 6, number, choice)
        counted = written.heads[number].count_active_blocks(written.num_blocks)
        assert row.density == pytest.approx(counted / (written.num_blocks * (written.num_blocks + 1) / 2))


def test_steps_layers_and_documents(tmp_path: Path) -> None:
    with TraceWriter(tmp_path, tiny.trace_header()) as writer:
        writer.append(2, tiny.layer_records(1))
        writer.append(7, tiny.layer_records(2, documents=True))
        assert (writer.steps, writer.next_step) == ((2, 7), 8)
    trace = Trace.open(tmp_path)
    assert (trace.steps, trace.layers, trace.unlisted_parts) == ((2, 7), (0, 1), ())
    assert trace.layer_pattern(2, 1).documents is None
    for layer, (written, _) in tiny.layer_records(2, documents=True).items():
        tiny.assert_same_layer(trace.layer_pattern(7, layer), written)


@pytest.mark.parametrize("blocks", [1, 2, 7, 8, 15, 16, 33])
def test_packed_bits(blocks: int) -> None:
    bits = np.tril(np.random.default_rng(blocks).random((blocks, blocks)) < 0.5)
    np.testing.assert_array_equal(unpack_bits(pack_bits(bits), blocks), bits)


def test_the_same_trace_has_the_same_digest(tmp_path: Path) -> None:
    digests = set()
    for name in ("a", "b"):
        with TraceWriter(tmp_path / name, tiny.trace_header()) as writer:
            writer.append(0, tiny.layer_records(0))
        digests.add(Trace.open(tmp_path / name).digest())
    with TraceWriter(tmp_path / "b", tiny.trace_header()) as writer:
        writer.append(1, tiny.layer_records(0))
    assert len(digests) == 1
    assert Trace.open(tmp_path / "b").digest() not in digests


def test_a_long_step_is_small(tmp_path: Path) -> None:
    """512K tokens, 16 of 576 heads with 4,096 columns and 200 diagonals each: a thirty-sixth of 3.2 MB."""
    rng, seq_len = np.random.default_rng(0), 524288
    heads = tuple(
        tiny.slash(rng.choice(seq_len, 4096, replace=False), rng.choice(4096, 200, replace=False)) for _ in range(16)
    )
    layer = LayerPattern(seq_len_tokens=seq_len, block_size=128, heads=heads)
    shape = ModelShape(model_id="m", layers=1, heads=16, kv_heads=2, head_dim=128)
    head = tiny.trace_header(model=shape, recorded_layers=(0,), seq_len_tokens=seq_len, block_size=128)
    with TraceWriter(tmp_path, head) as writer:
        writer.append(0, {0: (layer, [tiny.CHOICE] * 16)})
    assert Trace.open(tmp_path).manifest.parts[0].bytes < 3.2e6 / 36
