"""Seeded patterns of the kinds that trained models show, for planning and tests without a model.

Every generator draws one layer of any length, number of heads and block size; the same seed gives the same layer.
`density` is the asked share of active causal block pairs (diagonal blocks whole, columns excluded); what comes out is
near it, and at least the diagonal.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, TypeAlias

import numpy as np

from .blocks.draws import gated_blocks, wanted_blocks
from .dataset.manifest import ModelShape, TraceHeader, library_versions, parse_model
from .dataset.rows import HeadChoice
from .dataset.store import Trace
from .dataset.writer import TraceWriter
from .errors import InputError, unknown_name
from .pattern import BlockMask, HeadPattern, LayerPattern, VerticalSlash, dense, num_blocks
from .progress import Progress, no_progress


@dataclass(frozen=True, kw_only=True)
class SyntheticSettings:
    """What a generator draws from; each kind uses (and a trace records) only the fields that concern it.

    density:        asked share of active causal block pairs
    columns:        token columns per head (vertical-slash, skewed)
    sink_tokens:    columns at the start of the sequence (sink-window)
    window_tokens:  sliding window (sink-window)
    chunk_tokens:   key chunk that a gate chooses (moba-block), a multiple of block_size
    skew:           how many times denser the dense heads are (skewed)
    dense_heads:    share of heads that are dense (skewed)
    mean_document_tokens: average document (packed-documents)
    """

    seq_len_tokens: int
    heads: int
    block_size: int = 128
    density: float = 0.05
    columns: int = 1024
    sink_tokens: int = 30
    window_tokens: int = 1024
    chunk_tokens: int = 512
    skew: float = 8.0
    dense_heads: float = 0.125
    mean_document_tokens: int = 4096

    def __post_init__(self) -> None:
        for name in ("seq_len_tokens", "block_size", "heads", "window_tokens", "chunk_tokens", "mean_document_tokens"):
            if getattr(self, name) < 1:
                raise InputError(f"must be at least 1, not {getattr(self, name)}", field=name)
        for name in ("columns", "sink_tokens"):
            if getattr(self, name) < 0:
                raise InputError(f"must not be negative, is {getattr(self, name)}", field=name)
        for name in ("density", "dense_heads"):
            if not 0.0 < getattr(self, name) <= 1.0:
                raise InputError(f"must be above 0 and at most 1, not {getattr(self, name)}", field=name)
        if not self.skew >= 1:
            raise InputError(f"must be at least 1, not {self.skew}", field="skew")

    @property
    def blocks(self) -> int:
        """Mask blocks of the sequence."""
        return num_blocks(self.seq_len_tokens, self.block_size)

    def layer(self, heads: Sequence[HeadPattern]) -> LayerPattern:
        """Return the heads as a layer of this length and block size."""
        return LayerPattern(seq_len_tokens=self.seq_len_tokens, block_size=self.block_size, heads=tuple(heads))


Random: TypeAlias = np.random.Generator
# settings, a layer's own randomness, and the one that all layers of a training step share
MakeLayer: TypeAlias = Callable[[SyntheticSettings, Random, Random], LayerPattern]


class Generator(NamedTuple):
    """One kind of synthetic pattern and the settings that it uses beside shape and block size."""

    make: MakeLayer
    uses: tuple[str, ...]


def synthesize(
    kind: str, settings: SyntheticSettings, *, seed: int = 0, training_step: int = 0, layer: int = 0
) -> LayerPattern:
    """Return one layer's pattern of a kind in `GENERATORS`; equal arguments give equal patterns."""
    own, shared = np.random.default_rng([seed, training_step, layer]), np.random.default_rng([seed, training_step])
    return _generator(kind).make(settings, own, shared)


def write_synthetic_trace(
    folder: Path | str, kind: str, settings: SyntheticSettings, *, layers: int = 1, steps: int = 1, seed: int = 0,
    kv_heads: int | None = None, head_dim: int = 128, progress: Progress = no_progress,
) -> Trace:  # fmt: skip
    """Write a trace of `steps` training steps and `layers` layers of one kind, and return it opened.

    kv_heads defaults to one for eight query heads where that divides, else to the number of query heads.
    An existing trace of the same header is continued to that many steps: what it has stays. Raises InputError when
    that was drawn with other settings.
    """
    uses = _generator(kind).uses
    if layers < 1 or steps < 1:
        raise InputError(f"at least one layer and step are needed, not {layers} and {steps}", field="layers, steps")
    choice = HeadChoice(selector=f"synthetic-{kind}", settings={name: getattr(settings, name) for name in uses})
    heads = settings.heads
    kv_heads = kv_heads or (heads // 8 if heads % 8 == 0 else heads)
    shape = {"layers": layers, "heads": heads, "kv_heads": kv_heads, "head_dim": head_dim}
    model = parse_model(ModelShape, {"model_id": f"synthetic-{kind}", **shape}).model_dump()
    recorded = {"seq_len_tokens": settings.seq_len_tokens, "block_size": settings.block_size, "origin": "synthetic"}
    versions = library_versions("sparsering", "numpy", "pyarrow")
    recorded |= {"recorded_layers": list(range(layers)), "seed": seed, "versions": versions}
    with TraceWriter(folder, parse_model(TraceHeader, {"model": model, **recorded})) as writer:
        if writer.steps:
            _require_same(Trace.open(folder), choice)
        for training_step in range(writer.next_step, steps):
            with writer.step(training_step) as part:
                for layer in range(layers):
                    progress("drawing layers", training_step * layers + layer, steps * layers)
                    pattern = synthesize(kind, settings, seed=seed, training_step=training_step, layer=layer)
                    part.append(layer, pattern, [choice] * settings.heads)
    return Trace.open(folder)


def _require_same(trace: Trace, choice: HeadChoice) -> None:
    """Raise InputError unless the first head of a trace was drawn as `choice` says."""
    there = trace.layer_rows(trace.steps[0], trace.layers[0])[0].choice.settings
    for name, value in choice.settings.items():
        if there.get(name) != value:
            told = f"the trace there was drawn with {there.get(name)}, not {value}: write into another folder"
            raise InputError(told, source=trace.folder, field=name)


def _generator(kind: str) -> Generator:
    if kind not in GENERATORS:
        raise unknown_name(kind, GENERATORS, field="kind")
    return GENERATORS[kind]


def _dense(settings: SyntheticSettings, own: Random, shared: Random) -> LayerPattern:
    return dense(seq_len_tokens=settings.seq_len_tokens, block_size=settings.block_size, heads=settings.heads)


def _sink_window(settings: SyntheticSettings, own: Random, shared: Random) -> LayerPattern:
    """StreamingLLM's shape (arXiv 2309.17453): the first tokens as columns, and a sliding window of whole blocks."""
    window_blocks = min(-(-settings.window_tokens // settings.block_size) + 1, settings.blocks)
    head = VerticalSlash(
        columns=np.arange(min(settings.sink_tokens, settings.seq_len_tokens), dtype=np.int32),
        diagonals=np.arange(window_blocks, dtype=np.int32),
    )
    return settings.layer([head] * settings.heads)


def _head_by_head(draw_head: Callable[[SyntheticSettings, Random], HeadPattern]) -> MakeLayer:
    """Return what makes a layer of heads that are drawn one after the other."""
    return lambda settings, own, _: settings.layer([draw_head(settings, own) for _ in range(settings.heads)])


def _vertical_slash_head(settings: SyntheticSettings, rng: Random, density: float | None = None) -> VerticalSlash:
    """MInference's shape (arXiv 2407.02490): some slashes beside the main diagonal, the others anywhere.

    A slash lies half a block past a whole block distance, so that it touches two diagonals. Three tenths of the asked
    pairs are local; diagonals are taken in the order drawn until their lengths add up to the density.
    """
    blocks = settings.blocks
    asked_pairs = (density or settings.density) * blocks * (blocks + 1) / 2
    lengths = blocks - np.arange(blocks)
    local = 1 + int(np.searchsorted(np.cumsum(lengths), 0.3 * asked_pairs))
    slashes = np.concatenate([np.arange(min(local, blocks)), rng.permutation(np.arange(local, blocks))])
    touched = np.stack([slashes, slashes + 1], axis=1).ravel()
    touched = touched[touched < blocks]
    in_order = touched[np.sort(np.unique(touched, return_index=True)[1])]
    kept = 1 + int(np.searchsorted(np.cumsum(lengths[in_order]), asked_pairs))
    tokens = settings.seq_len_tokens
    columns = rng.choice(tokens, size=min(settings.columns, tokens), replace=False, shuffle=False)
    return VerticalSlash(columns=columns.astype(np.int32), diagonals=in_order[:kept].astype(np.int32))


def _skewed(settings: SyntheticSettings, own: Random, shared: Random) -> LayerPattern:
    """Vertical-slash heads of which a few, anywhere in the layer, are `skew` times denser; the mean is `density`."""
    heads = settings.heads
    dense_heads = min(heads, max(1, round(settings.dense_heads * heads)))
    light_heads = heads - dense_heads
    dense = min(1.0, settings.skew * settings.density * heads / (dense_heads * settings.skew + light_heads))
    light = (settings.density * heads - dense * dense_heads) / max(light_heads, 1)
    densities = np.full(heads, light)
    densities[own.permutation(heads)[:dense_heads]] = dense
    return settings.layer([_vertical_slash_head(settings, own, float(share)) for share in densities])


def _xattention_head(settings: SyntheticSettings, rng: Random) -> BlockMask:
    return BlockMask(bits=wanted_blocks(settings.blocks, settings.density, rng))


def _moba_head(settings: SyntheticSettings, rng: Random) -> BlockMask:
    if settings.chunk_tokens % settings.block_size:
        raise InputError(
            f"{settings.chunk_tokens} is no multiple of block_size {settings.block_size}", field="chunk_tokens"
        )
    chunk_blocks = settings.chunk_tokens // settings.block_size
    return BlockMask(bits=gated_blocks(settings.blocks, settings.density, rng, chunk_blocks=chunk_blocks))


def _packed_documents(settings: SyntheticSettings, own: Random, shared: Random) -> LayerPattern:
    """Dense attention inside packed documents of log-normal lengths, the same ones for all layers of a step."""
    mean = settings.mean_document_tokens
    draws = -(-2 * settings.seq_len_tokens // mean) + 8
    lengths = 1 + shared.lognormal(np.log(mean) - 0.5, 1.0, draws).astype(np.int64)
    lengths = np.append(lengths, settings.seq_len_tokens)  # the last document takes what is left
    documents = np.repeat(np.arange(lengths.size, dtype=np.int32), lengths)[: settings.seq_len_tokens]
    return replace(_dense(settings, own, shared), documents=documents)


GENERATORS = {
    "dense": Generator(make=_dense, uses=()),
    "sink-window": Generator(make=_sink_window, uses=("sink_tokens", "window_tokens")),
    "vertical-slash": Generator(make=_head_by_head(_vertical_slash_head), uses=("density", "columns")),
    "skewed": Generator(make=_skewed, uses=("density", "columns", "skew", "dense_heads")),
    "xattention": Generator(make=_head_by_head(_xattention_head), uses=("density",)),
    "moba-block": Generator(make=_head_by_head(_moba_head), uses=("density", "chunk_tokens")),
    "packed-documents": Generator(make=_packed_documents, uses=("mean_document_tokens",)),
}
