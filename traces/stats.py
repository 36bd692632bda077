"""What a trace says: density, kept mass, how much patterns change between training steps."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .dataset.rows import HeadChoice, HeadRow
from .dataset.store import Trace
from .errors import InputError
from .pattern import HeadPattern, VerticalSlash
from .progress import Progress, no_progress


def jaccard(first: NDArray[np.integer], second: NDArray[np.integer]) -> float:
    """Return |A and B| / |A or B| of two sets given as arrays without repeats; 1 for two empty ones."""
    shared = np.intersect1d(first, second, assume_unique=True).size
    union = first.size + second.size - shared
    return 1.0 if union == 0 else shared / union


def block_overlap(first: HeadPattern, second: HeadPattern, blocks: int) -> float:
    """Return the Jaccard overlap of two heads' active block pairs; 1 for two empty ones.

    A pair that a window's edge cuts is shared only with one that a window of the same length cuts.
    """
    if isinstance(first, VerticalSlash) and isinstance(second, VerticalSlash):
        lengths = blocks - np.arange(blocks)
        shared = lengths[_shared_diagonals(first, second)].sum()
        union = lengths[np.union1d(first.diagonals, second.diagonals)].sum()
    else:
        whole = [_whole_bits(head, blocks) for head in (first, second)]
        shared = np.count_nonzero(whole[0] & whole[1])
        union = np.count_nonzero(first.block_bits(blocks) | second.block_bits(blocks))
    return 1.0 if union == 0 else float(shared / union)


def _shared_diagonals(first: VerticalSlash, second: VerticalSlash) -> NDArray[np.int32]:
    shared = np.intersect1d(first.whole, second.whole, assume_unique=True)
    if first.window_tokens != second.window_tokens:
        return shared
    return np.union1d(shared, np.intersect1d(first.cut, second.cut, assume_unique=True))


def _whole_bits(head: HeadPattern, blocks: int) -> NDArray[np.bool_]:
    """Return the active block pairs that no window's edge cuts, bool [N, N]."""
    if isinstance(head, VerticalSlash) and head.cut.size:
        head = VerticalSlash(columns=head.columns, diagonals=head.whole)
    return head.block_bits(blocks)


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


def summarize(trace: Trace, *, progress: Progress = no_progress) -> list[dict[str, Any]]:
    """Return one summary per recorded layer, over all its heads and training steps; InputError where there is none yet.

    Reads, and so checks, every byte of the trace. Its keys are columns of `sparsering inspect`; masses are None where
    none was recorded.
    """
    if not trace.steps:
        raise InputError("holds no training step yet", source=trace.folder)
    gathered: dict[int, list[_HeadFigures]] = {layer: [] for layer in trace.layers}
    for rows in trace.each_layer(progress=progress):
        gathered[rows[0].layer] += [_HeadFigures.of(row) for row in rows]
    return [_summarize_layer(layer, figures) for layer, figures in gathered.items()]


class _HeadFigures(NamedTuple):
    """What a summary keeps of a head: masks of all heads together would not fit into memory."""

    density: float
    columns: int
    choice: HeadChoice

    @classmethod
    def of(cls, row: HeadRow) -> _HeadFigures:
        return cls(density=row.density, columns=row.pattern.columns.size, choice=row.choice)


def _summarize_layer(layer: int, heads: list[_HeadFigures]) -> dict[str, Any]:
    densities, columns = [head.density for head in heads], [head.columns for head in heads]
    choices = [head.choice for head in heads]
    sampled = [choice.kept_mass_sampled for choice in choices if choice.kept_mass_sampled is not None]
    probe = [choice.kept_mass_probe for choice in choices if choice.kept_mass_probe is not None]
    return {
        "layer": layer,
        "selectors": sorted({choice.selector for choice in choices}),
        "density_mean": float(np.mean(densities)),
        "density_min": min(densities),
        "density_max": max(densities),
        "columns_mean": float(np.mean(columns)),
        "columns_max": max(columns),
        "kept_mass_probe_mean": float(np.mean(probe)) if probe else None,
        "kept_mass_sampled_mean": float(np.mean(sampled)) if sampled else None,
        "kept_mass_sampled_min": min(sampled) if sampled else None,
    }


def kept_of_documents(trace: Trace, *, progress: Progress = no_progress) -> list[dict[str, Any]]:
    """Return one summary per packed document of each training step that recorded what is kept of each; else none.

    training_step, document (counted from 0), first_token, tokens; kept_mass_mean and kept_mass_min: the share of
    attention kept for its last queries, over all layers and heads that choose.
    """
    if all(part.document_starts_tokens is None for part in trace.manifest.parts):
        return []
    gathered: dict[int, list[tuple[float, ...]]] = {}
    for rows in trace.each_layer(progress=progress):
        known = [row.choice.kept_mass_documents for row in rows]
        gathered.setdefault(rows[0].training_step, []).extend(masses for masses in known if masses is not None)
    found = []
    for step, masses in gathered.items():
        documents = trace.documents(step)
        if documents is None or not masses:
            continue
        _, first, tokens = np.unique(documents, return_index=True, return_counts=True)
        means, least = np.mean(masses, axis=0), np.min(masses, axis=0)
        found += [
            {"training_step": step, "document": number, "first_token": int(first[number]),
             "tokens": int(tokens[number]), "kept_mass_mean": float(means[number]),
             "kept_mass_min": float(least[number])}
            for number in range(len(first))
        ]  # fmt: skip
    return found


def describe(trace: Trace, *, progress: Progress = no_progress) -> dict[str, Any]:
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
        "layers": summarize(trace, progress=progress) if trace.steps else [],
        "documents": kept_of_documents(trace, progress=progress) if trace.steps else [],
        "step_overlap": overlaps,
    }
