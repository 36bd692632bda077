"""What a trace says: density, kept mass, how much patterns change between training steps."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .dataset.rows import HeadRow
from .dataset.store import Trace
from .errors import InputError
from .pattern import HeadPattern, VerticalSlash


def jaccard(first: NDArray[np.integer], second: NDArray[np.integer]) -> float:
    """Return |A and B| / |A or B| of two sets given as arrays without repeats; 1 for two empty ones."""
    shared = np.intersect1d(first, second, assume_unique=True).size
    union = first.size + second.size - shared
    return 1.0 if union == 0 else shared / union


def block_overlap(first: HeadPattern, second: HeadPattern, blocks: int) -> float:
    """Return the Jaccard overlap of two heads' active block pairs; 1 for two empty ones."""
    if isinstance(first, VerticalSlash) and isinstance(second, VerticalSlash):
        lengths = blocks - np.arange(blocks)
        shared = lengths[np.intersect1d(first.diagonals, second.diagonals)].sum()
        union = lengths[np.union1d(first.diagonals, second.diagonals)].sum()
    else:
        bits = first.block_bits(blocks), second.block_bits(blocks)
        shared, union = np.count_nonzero(bits[0] & bits[1]), np.count_nonzero(bits[0] | bits[1])
    return 1.0 if union == 0 else float(shared / union)


def step_overlap(trace: Trace, first_step: int, second_step: int) -> dict[str, float]:
    """Return how alike two recorded training steps are, as means over heads: Jaccard of "columns" and of "blocks".

    blocks: active block pairs. InputError when a step was not recorded.
    """
    columns: list[float] = []
    pairs: list[float] = []
    for layer in trace.layers:
        first, second = trace.layer_pattern(first_step, layer), trace.layer_pattern(second_step, layer)
        for a, b in zip(first.heads, second.heads, strict=True):
            columns.append(jaccard(a.columns, b.columns))
            pairs.append(block_overlap(a, b, first.num_blocks))
    return {"columns": float(np.mean(columns)), "blocks": float(np.mean(pairs))}


def summarize(trace: Trace) -> list[dict[str, Any]]:
    """Return one summary per recorded layer, over all its heads and training steps; InputError where there is none yet.

    Its keys are columns of `sparsering inspect`; masses are None where none was recorded.
    """
    if not trace.steps:
        raise InputError("holds no training step yet", source=trace.folder)
    gathered: dict[int, list[HeadRow]] = {layer: [] for layer in trace.layers}
    for step in trace.steps:  # step by step: a part is read and verified once
        for row in trace.heads(step):
            gathered[row.layer].append(row)
    return [_summarize_layer(layer, rows) for layer, rows in gathered.items()]


def _summarize_layer(layer: int, rows: list[HeadRow]) -> dict[str, Any]:
    densities = [row.density for row in rows]
    columns = [row.pattern.columns.size for row in rows]
    sampled = [row.choice.kept_mass_sampled for row in rows if row.choice.kept_mass_sampled is not None]
    probe = [row.choice.kept_mass_probe for row in rows if row.choice.kept_mass_probe is not None]
    return {
        "layer": layer,
        "selectors": sorted({row.choice.selector for row in rows}),
        "density_mean": float(np.mean(densities)),
        "density_min": min(densities),
        "density_max": max(densities),
        "columns_mean": float(np.mean(columns)),
        "columns_max": max(columns),
        "kept_mass_probe_mean": float(np.mean(probe)) if probe else None,
        "kept_mass_sampled_mean": float(np.mean(sampled)) if sampled else None,
        "kept_mass_sampled_min": min(sampled) if sampled else None,
    }


def describe(trace: Trace) -> dict[str, Any]:
    """Return the whole trace as plain JSON values: header, steps, digest, what is unlisted, one row per layer."""
    header = trace.header.model_dump(mode="json")
    overlaps = [{"from": a, "to": b, **step_overlap(trace, a, b)} for a, b in pairwise(trace.steps)]
    return {
        "trace": str(trace.folder),
        "digest": trace.digest(),
        **header,
        "steps": list(trace.steps),
        "unlisted_parts": list(trace.unlisted_parts),
        "bytes": sum(part.bytes for part in trace.manifest.parts),
        "layers": summarize(trace) if trace.steps else [],
        "step_overlap": overlaps,
    }
