"""What the search takes from a trace: a few layers to evaluate, the work of every block, and the most columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...traces.dataset.rows import HeadRow
from ...traces.dataset.store import Trace
from ...traces.errors import InputError, UnsupportedError, unknown_name
from ...traces.files import canonical_json
from ...traces.pattern import LayerPattern, has_windows, lists_blocks, num_blocks
from ...traces.progress import Progress, no_progress
from ..plan import ModelShape, PatternSpec
from ..replay import Recorded
from ..schedule.active import contents_of
from ..schedule.heads import head_load
from ..schedule.pairs import active_blocks
from ..schedule.workload import unit_load
from ..specs import MODEL, SelectorSpec
from .problem import TraceSummary

DEFAULT_LAYERS = 4
MAX_LOADED_LAYERS = 64
COLUMNS_MULTIPLE = 64
MAX_COUNTED_BLOCKS = 16384  # their pairs are a quarter of a gigabyte
# Of all causal block pairs: where some layers together activate so many, a pair of shards without any is not to be
# hoped for, and block masks of further layers, which take long to read, need not be looked at.
WIDE_SHARE = 0.5


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
    """Read every layer of every step for columns and active blocks; the loads of at most 64 of them, evenly spread.

    Of a step those of the 64 are read first. Where there are more layers that list blocks, active ones are counted no
    longer once most of what is causal is.
    """
    recorded = [(step, layer) for step in trace.steps for layer in trace.layers]
    loaded = set(evenly_spread(recorded, MAX_LOADED_LAYERS))
    recorded.sort(key=lambda one: (trace.steps.index(one[0]), one not in loaded))  # a step's file is opened once
    header, most_columns, load, listed, windowed = trace.header, 0, 0.0, False, False
    blocks = num_blocks(header.seq_len_tokens, header.block_size)
    of_heads: dict[int, list[NDArray[np.float64]]] = {}
    choices: dict[int, tuple[SelectorSpec, ...]] = {}
    reach = np.zeros((blocks, blocks), dtype=bool) if blocks <= MAX_COUNTED_BLOCKS else None
    last = _Counted()
    for number, (step, layer) in enumerate(recorded):
        rows = trace.layer_rows(step, layer)
        pattern = trace.pattern_of_rows(rows)
        choices[layer] = _ways([*choices.get(layer, ()), *_choices(rows)])
        most_columns = max(most_columns, pattern.max_columns)
        last = last if last.is_of(pattern) else _Counted(pattern)
        of_heads.setdefault(layer, []).append(last.head_load)
        of_blocks = lists_blocks(pattern)
        listed |= of_blocks
        windowed |= has_windows(pattern)
        if reach is not None and of_blocks and len(recorded) > len(loaded) and _is_wide(reach):
            reach = None
        if reach is not None:
            last.add_to(reach)
        if (step, layer) in loaded:
            load = load + last.block_load
        progress("reading the trace", number + 1, len(recorded))
    return TraceSummary(
        columns_capacity=-(-most_columns // COLUMNS_MULTIPLE) * COLUMNS_MULTIPLE,
        block_load=np.asarray(load, dtype=np.float64),
        loaded_layers=len(loaded),
        recorded_layers=len(recorded),
        active_blocks=reach,
        head_load={layer: np.mean(loads, axis=0) for layer, loads in of_heads.items()},
        listed=listed,
        windowed=windowed,
        choices=choices,
    )


class _Counted:
    """What is counted of one pattern, each number once: layers of a trace may follow each other that are alike."""

    def __init__(self, pattern: LayerPattern | None = None) -> None:
        self._contents = None if pattern is None else contents_of(pattern)
        self._pattern, self._has_been_added = pattern, False

    def is_of(self, pattern: LayerPattern) -> bool:
        """Whether a pattern makes the same work."""
        return self._contents == contents_of(pattern)

    @cached_property
    def head_load(self) -> NDArray[np.float64]:
        """The work of every query head."""
        assert self._pattern is not None
        return head_load(self._pattern)

    @cached_property
    def block_load(self) -> NDArray[np.float64]:
        """The work of every mask block as queries."""
        assert self._pattern is not None
        size = self._pattern.block_size
        return unit_load([self._pattern], granularity_tokens=size, padded_tokens=self._pattern.num_blocks * size)

    def add_to(self, reach: NDArray[np.bool_]) -> None:
        """Add the active blocks, once."""
        assert self._pattern is not None
        if not self._has_been_added:
            np.logical_or(reach, active_blocks(self._pattern), out=reach)
            self._has_been_added = True


def _is_wide(reach: NDArray[np.bool_]) -> bool:
    blocks = len(reach)
    return int(np.count_nonzero(reach)) > WIDE_SHARE * blocks * (blocks + 1) / 2


def evenly_spread(items: Sequence, count: int) -> list:
    """Return `count` items in order, first and last among them, or the middle one; all when there are no more."""
    if len(items) <= count:
        return list(items)
    if count == 1:
        return [items[len(items) // 2]]
    return [items[round(place)] for place in np.linspace(0, len(items) - 1, count)]


def model_of(trace: Trace) -> ModelShape:
    """Return what a plan needs to know of the model that was recorded."""
    return ModelShape(**trace.header.model.model_dump(exclude={"model_id"}))


def pattern_spec(
    trace: Trace, source: str, samples: Sequence[Recorded], *, summary: TraceSummary | None = None
) -> PatternSpec:
    """Return how a run comes by its patterns: replayed from the trace, or chosen anew as the trace's were.

    It is windowed where any pattern is, or the model itself has a window shorter than the sequence. summary: of the
    whole trace, so that layers which were not sampled count as well; None: the samples and the model tell.
    "choose" needs one selector with one setting for all heads of a layer, and one that a model can be asked for; where
    layers differ, it needs all of the model's.
    """
    listed = any(lists_blocks(sample.pattern) for sample in samples)
    windowed = model_of(trace).windows_within(trace.header.seq_len_tokens)
    windowed |= any(has_windows(sample.pattern) for sample in samples) or (summary is not None and summary.windowed)
    if source == "trace":
        return PatternSpec(source="trace", trace_sha256=trace.digest(), listed=listed, windowed=windowed)
    if source != "choose":
        raise unknown_name(source, ("trace", "choose"), field="pattern")
    if trace.header.origin == "synthetic":
        raise UnsupportedError("a synthetic trace was not chosen by a selector", source=trace.folder, field="pattern")
    choices = summary.choices if summary is not None else _sampled_choices(trace, samples)
    return PatternSpec(source="choose", listed=listed, windowed=windowed, **_chosen_again(trace, choices))


def _chosen_again(trace: Trace, choices: Mapping[int, tuple[SelectorSpec, ...]]) -> dict[str, Any]:
    """Return what a pattern says of its selector, or of each layer's. UnsupportedError where neither can be said."""
    for layer, ways in choices.items():
        if len(ways) > 1:
            raise UnsupportedError(f"heads of layer {layer} were chosen in {len(ways)} different ways; only one can be "
                                   "planned for", field="pattern")  # fmt: skip
    of_data = _ways([way for (way,) in choices.values() if way.selector != MODEL])
    if len(of_data) == 1:
        return {"selector": of_data[0].selector, "settings": of_data[0].settings}
    model, tokens = model_of(trace), trace.header.seq_len_tokens
    by_layer: list[SelectorSpec] = []
    for layer in range(model.layers):
        own = model.limits(layer, tokens)
        if not own and layer not in choices:
            raise UnsupportedError(f"layers were chosen in different ways, and layer {layer} was not recorded",
                                   field="pattern")  # fmt: skip
        by_layer.append(SelectorSpec(selector=MODEL, settings=own) if own else choices[layer][0])
    return {"by_layer": tuple(by_layer)}


def _sampled_choices(trace: Trace, samples: Sequence[Recorded]) -> dict[int, tuple[SelectorSpec, ...]]:
    choices: dict[int, tuple[SelectorSpec, ...]] = {}
    for sample in samples:
        rows = trace.layer_rows(sample.training_step, sample.layer)
        choices[sample.layer] = _ways([*choices.get(sample.layer, ()), *_choices(rows)])
    return choices


def _choices(rows: Sequence[HeadRow]) -> list[SelectorSpec]:
    return [SelectorSpec(selector=row.choice.selector, settings=dict(row.choice.settings)) for row in rows]


def _ways(choices: Sequence[SelectorSpec]) -> tuple[SelectorSpec, ...]:
    """Return each different one once, in order."""
    return tuple({canonical_json(one.model_dump()): one for one in choices}.values())


def _check_recorded(trace: Trace, field: str, asked: Sequence[int], recorded: Sequence[int]) -> None:
    if not asked:
        raise InputError("needs at least one", field=field)
    for number in asked:
        if number not in recorded:
            raise InputError(f"{number} was not recorded", source=trace.folder, field=field)
