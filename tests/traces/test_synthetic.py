"""Synthetic patterns: seeded, of any shape, of the kind and density asked for."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from sparsering import cli
from sparsering.traces.dataset.rows import head_density
from sparsering.traces.dataset.store import Trace
from sparsering.traces.errors import InputError
from sparsering.traces.pattern import BlockMask, LayerPattern, VerticalSlash, element_mask
from sparsering.traces.synthetic import GENERATORS, SyntheticSettings, synthesize, write_synthetic_trace


def drawn(kind: str, seed: int = 0, training_step: int = 0, layer: int = 0, **settings: Any) -> LayerPattern:
    defaults: dict[str, Any] = {"seq_len_tokens": 16384, "heads": 4, "block_size": 64}
    return synthesize(
        kind, SyntheticSettings(**{**defaults, **settings}), seed=seed, training_step=training_step, layer=layer
    )


def bits(layer: LayerPattern, head: int) -> np.ndarray:
    return layer.heads[head].block_bits(layer.num_blocks)


@given(
    kind=st.sampled_from(sorted(GENERATORS)),
    seq_len_tokens=st.integers(1, 3000),
    block_size=st.sampled_from([64, 128]),
    heads=st.integers(1, 5),
    density=st.floats(0.001, 1),
    seed=st.integers(0, 99),
)
def test_any_shape_gives_a_valid_layer_without_empty_rows(
    kind: str, seq_len_tokens: int, block_size: int, heads: int, density: float, seed: int
) -> None:
    layer = drawn(
        kind, seed, seq_len_tokens=seq_len_tokens, block_size=block_size, heads=heads, density=density, columns=20
    )
    assert (layer.seq_len_tokens, layer.block_size, layer.num_heads) == (seq_len_tokens, block_size, heads)
    for head in layer.heads:
        assert np.diag(head.block_bits(layer.num_blocks)).all()


@pytest.mark.parametrize("kind", sorted(GENERATORS))
def test_seed_step_and_layer_decide(kind: str) -> None:
    first, again = drawn(kind, seed=5, density=0.3), drawn(kind, seed=5, density=0.3)
    for head in range(first.num_heads):
        np.testing.assert_array_equal(first.heads[head].columns, again.heads[head].columns)
        np.testing.assert_array_equal(bits(first, head), bits(again, head))
    if kind in ("dense", "sink-window"):
        return
    if first.documents is not None:  # packed documents: every layer of a step shares them
        np.testing.assert_array_equal(first.documents, drawn(kind, seed=5, layer=1).documents)
        others = [drawn(kind, seed=6), drawn(kind, seed=5, training_step=1)]
        assert all(other.documents is not None for other in others)
        assert all(not np.array_equal(first.documents, np.asarray(other.documents)) for other in others)
        return
    for other in ({"seed": 6}, {"seed": 5, "training_step": 1}, {"seed": 5, "layer": 1}):
        assert not np.array_equal(bits(first, 0), bits(drawn(kind, density=0.3, **other), 0))


@pytest.mark.parametrize("kind", ["vertical-slash", "skewed", "xattention", "moba-block"])
@pytest.mark.parametrize("density", [0.03, 0.1, 0.4])
def test_density_is_near_what_was_asked(kind: str, density: float) -> None:
    layer = drawn(kind, density=density, seq_len_tokens=65536, heads=8)  # 1,024 blocks
    assert layer.density == pytest.approx(density, rel=0.2)


def test_dense_is_full_causal_attention() -> None:
    layer = drawn("dense", seq_len_tokens=200)
    np.testing.assert_array_equal(element_mask(layer, 0), np.tri(200, dtype=bool))


def test_sink_and_window_cover_what_they_say() -> None:
    layer = drawn("sink-window", seq_len_tokens=1000, sink_tokens=5, window_tokens=100)
    mask, distance = element_mask(layer, 3), np.arange(1000)[:, None] - np.arange(1000)[None, :]
    assert mask[(distance >= 0) & (distance < 100)].all()
    assert mask[5:, :5].all()
    assert not mask[(distance >= 100 + 2 * 64) & (np.arange(1000)[None, :] >= 5)].any()


def test_vertical_slash_has_columns_and_a_local_band() -> None:
    layer = drawn("vertical-slash", density=0.1, columns=77)
    for head in layer.heads:
        assert isinstance(head, VerticalSlash)
        assert head.columns.size == 77
        local = int(np.argmax(np.diff(head.diagonals) > 1)) + 1
        assert 1 < local < head.diagonals.size, "some diagonals are local, some far"


def test_skewed_heads() -> None:
    layer = drawn("skewed", heads=16, density=0.04, skew=8.0, dense_heads=0.125, seq_len_tokens=65536)
    density = np.sort([head_density(head, layer.num_blocks) for head in layer.heads])
    assert density[-2:].mean() / density[:-2].mean() == pytest.approx(8, rel=0.15)


def test_block_masks_depend_on_content_as_their_selectors_do() -> None:
    for head in drawn("xattention", density=0.05, seq_len_tokens=65536).heads:
        assert isinstance(head, BlockMask)
        assert head.bits[:, 0].all(), "the first block stays"
        columns = head.bits[512:, :512].mean(axis=0)  # rows that see all of these key blocks
        assert columns.std() > 3 * np.sqrt(columns.mean() / 512), "some key blocks are wanted far more than others"
    for head in drawn("moba-block", density=0.1, seq_len_tokens=65536, chunk_tokens=256).heads:
        assert isinstance(head, BlockMask)
        chunks = head.bits.reshape(1024, 256, 4)
        assert (chunks.any(2) == chunks.all(2))[3::4].all(), "chunks are taken whole"
        kept = chunks.any(2).sum(1)
        assert len(set(kept[kept.max() * 4 :])) == 1, "every later query block keeps the same number of chunks"


def test_packed_documents_have_the_mean_length_asked_for() -> None:
    documents = drawn("packed-documents", seq_len_tokens=1 << 20, mean_document_tokens=1000, heads=1).documents
    assert documents is not None
    assert np.unique(documents).size == pytest.approx((1 << 20) / 1000, rel=0.15)


@pytest.mark.parametrize(
    "field, value",
    [("seq_len_tokens", 0), ("heads", 0), ("block_size", -1), ("density", 0.0), ("density", 1.5), ("columns", -1),
     ("skew", 0.5), ("skew", float("nan")), ("density", float("nan")), ("dense_heads", 0.0), ("window_tokens", 0)],
)  # fmt: skip
def test_settings_that_cannot_be(field: str, value: float) -> None:
    with pytest.raises(InputError, match=field):
        SyntheticSettings(**({"seq_len_tokens": 100, "heads": 1} | {field: value}))  # type: ignore[arg-type]


def test_unknown_kind_and_crooked_chunk() -> None:
    with pytest.raises(InputError, match="kind: 'stripes' is not one of dense, sink-window"):
        drawn("stripes")
    with pytest.raises(InputError, match="chunk_tokens: 100 is no multiple of block_size 64"):
        drawn("moba-block", chunk_tokens=100)


@pytest.mark.parametrize("kind", sorted(GENERATORS))
def test_written_as_a_trace(tmp_path: Path, kind: str) -> None:
    settings = SyntheticSettings(seq_len_tokens=3000, heads=8, density=0.3, columns=50)
    write_synthetic_trace(tmp_path, kind, settings, layers=2, steps=2, seed=9)
    trace = write_synthetic_trace(tmp_path, kind, settings, layers=2, steps=4, seed=9)  # continues it
    assert write_synthetic_trace(tmp_path, kind, settings, layers=2, steps=4, seed=9).digest() == trace.digest()
    assert (trace.steps, trace.layers, trace.header.origin) == ((0, 1, 2, 3), (0, 1), "synthetic")
    assert (trace.header.model.kv_heads, trace.header.seed) == (1, 9)
    for step in trace.steps:
        for layer in trace.layers:
            written = synthesize(kind, settings, seed=9, training_step=step, layer=layer)
            read = trace.layer_pattern(step, layer)
            np.testing.assert_array_equal(element_mask(read, 5), element_mask(written, 5))
    (choice,) = {json.dumps([row.choice.selector, row.choice.settings]) for row in trace.heads(3)}
    assert json.loads(choice) == [
        f"synthetic-{kind}",
        {name: getattr(settings, name) for name in GENERATORS[kind].uses},
    ]


def test_a_trace_is_not_continued_with_other_settings(tmp_path: Path) -> None:
    settings = SyntheticSettings(seq_len_tokens=3000, heads=8, density=0.3)
    before = write_synthetic_trace(tmp_path, "xattention", settings).digest()
    for steps in (1, 2):
        with pytest.raises(InputError, match="density: the trace there was drawn with"):
            write_synthetic_trace(tmp_path, "xattention", replace(settings, density=0.2), steps=steps)
    assert Trace.open(tmp_path).digest() == before


def test_command(tmp_path: Path) -> None:
    arguments = ["synthesize", "xattention", "-o", str(tmp_path / "t"), "--seq-len", "4096", "--heads", "8", "--json"]
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 0, result.output
    summary = json.loads(result.stdout)
    assert summary["digest"] == Trace.open(tmp_path / "t").digest()
    assert summary["layers"][0]["selectors"] == ["synthetic-xattention"]
    shown = CliRunner().invoke(cli.app, ["inspect", str(tmp_path / "t")])
    assert shown.exit_code == 0 and "synthetic-xattention" in shown.stdout
    for wrong in (["--density", "2"], ["--block-size", "100"], ["--seq-len", "8192"]):
        assert CliRunner().invoke(cli.app, [*arguments, *wrong]).exit_code == 2
