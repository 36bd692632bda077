"""What the search takes from a trace: a few layers to evaluate, the work of every block, and the most columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ...traces.dataset.store import Trace
from ...traces.errors import InputError, UnsupportedError, unknown_name
from ...traces.pattern import lists_blocks, num_blocks
from ...traces.progress import Progress, no_progress
from ..plan import PatternSpec
from ..replay import Recorded
from ..schedule.heads import head_load
from ..schedule.pairs import active_blocks
from ..schedule.workload import unit_load

DEFAULT_LAYERS = 4
MAX_LOADED_LAYERS = 64
COLUMNS_MULTIPLE = 64
MAX_COUNTED_BLOCKS = 16384  # their pairs are a quarter of a gigabyte


@dataclass(frozen=True, kw_only=True, eq=False)
class TraceSummary:
    """What a whole trace says. block_load: float64 [N], work of each mask block as queries, over `loaded_layers`.

    head_load: by layer, float64 [H]: the work of each query head, mean over steps; see `heads.head_load`.
    listed: whether any head lists its active blocks one by one.
    active_blocks: bool [N, N], what any head of any layer and step activates; None where that was not counted.
    """

    columns_capacity: int
    block_load: NDArray[np.float64]
    loaded_layers: int
    recorded_layers: int
    active_blocks: NDArray[np.bool_] | None = None
    head_load: Mapping[int, NDArray[np.float64]] = field(default_factory=dict)
    listed: bool = False


def take_samples(
    trace: Trace, *, steps: Sequence[int] | None = None, layers: Sequence[int] | None = None
) -> tuple[Recorded, ...]:
    """Read the layers to evaluate: those asked for, else up to four evenly spread ones of the last training step."""
    if not trace.steps:
        raise InputError("holds no training step", source=trace.folder)
    steps = trace.steps[-1:] if steps is None else steps
    layers = evenly_spread(trace.layers, DEFAULT_LAYERS) if layers is None else layers
    _check_recorded(trace, "steps", steps, trace.steps)
    _check_recorded(trace, "layers", layers, trace.layers)
    return tuple(
        Recorded(training_step=step, layer=layer, pattern=trace.layer_pattern(step, layer))
        for step in dict.fromkeys(steps)
        for layer in dict.fromkeys(layers)
    )


def summarize(trace: Trace, *, progress: Progress = no_progress) -> TraceSummary:
    """Read every layer of every step for columns and active blocks; the loads of at most 64 of them, evenly spread."""
    recorded = [(step, layer) for step in trace.steps for layer in trace.layers]
    loaded = set(evenly_spread(recorded, MAX_LOADED_LAYERS))
    header, most_columns, load, listed = trace.header, 0, 0.0, False
    blocks = num_blocks(header.seq_len_tokens, header.block_size)
    of_heads: dict[int, list[NDArray[np.float64]]] = {}
    reach = np.zeros((blocks, blocks), dtype=bool) if blocks <= MAX_COUNTED_BLOCKS else None
    for number, (step, layer) in enumerate(recorded):
        pattern = trace.layer_pattern(step, layer)
        most_columns = max(most_columns, pattern.max_columns)
        of_heads.setdefault(layer, []).append(head_load(pattern))
        listed |= lists_blocks(pattern)
        if reach is not None:
            reach |= active_blocks(pattern)
        if (step, layer) in loaded:
            size = header.block_size
            load = load + unit_load([pattern], granularity_tokens=size, padded_tokens=pattern.num_blocks * size)
        progress("reading the trace", number + 1, len(recorded))
    return TraceSummary(
        columns_capacity=-(-most_columns // COLUMNS_MULTIPLE) * COLUMNS_MULTIPLE,
        block_load=np.asarray(load, dtype=np.float64),
        loaded_layers=len(loaded),
        recorded_layers=len(recorded),
        active_blocks=reach,
        head_load={layer: np.mean(loads, axis=0) for layer, loads in of_heads.items()},
        listed=listed,
    )


def evenly_spread(items: Sequence, count: int) -> list:
    """Return `count` items in order, first and last among them, or the middle one; all when there are no more."""
    if len(items) <= count:
        return list(items)
    if count == 1:
        return [items[len(items) // 2]]
    return [items[round(place)] for place in np.linspace(0, len(items) - 1, count)]


def pattern_spec(trace: Trace, source: str, samples: Sequence[Recorded]) -> PatternSpec:
    """Return how a run comes by its patterns: replayed from the trace, or chosen anew as the trace's were.

    "choose" needs one selector with one setting for all sampled heads, and one that a model can be asked for.
    """
    listed = any(lists_blocks(sample.pattern) for sample in samples)
    if source == "trace":
        return PatternSpec(source="trace", trace_sha256=trace.digest(), listed=listed)
    if source != "choose":
        raise unknown_name(source, ("trace", "choose"), field="pattern")
    if trace.header.origin == "synthetic":
        raise UnsupportedError("a synthetic trace was not chosen by a selector", source=trace.folder, field="pattern")
    choices = {}
    for sample in samples:
        for row in trace.layer_rows(sample.training_step, sample.layer):
            choices[(row.choice.selector, repr(sorted(row.choice.settings.items())))] = row.choice
    if len(choices) > 1:
        raise UnsupportedError(
            f"heads were chosen in {len(choices)} different ways; only one can be planned for", field="pattern"
        )
    (choice,) = choices.values()
    return PatternSpec(source="choose", selector=choice.selector, settings=dict(choice.settings), listed=listed)


def _check_recorded(trace: Trace, field: str, asked: Sequence[int], recorded: Sequence[int]) -> None:
    if not asked:
        raise InputError("needs at least one", field=field)
    for number in asked:
        if number not in recorded:
            raise InputError(f"{number} was not recorded", source=trace.folder, field=field)
