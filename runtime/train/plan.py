"""Which plan a training run follows: the file's, or a default one that is made here and says so."""

from __future__ import annotations

from pathlib import Path

import torch

from ...kernels.select.registry import Selector, selectors
from ...kernels.select.sink_window import dense
from ...planner.layouts.layout import Layout
from ...planner.layouts.ring import Ring
from ...planner.plan import AttentionSpec, KernelSpec, ModelShape, Plan, load_plan, make_plan
from ...planner.schedule.backends import computed_head_dim
from ...planner.schedule.pairs import causal_pairs
from ...planner.schedule.placement import Placement, striped, zigzag
from ...traces.dataset.store import Trace
from ...traces.errors import InputError, UnsupportedError
from ..baselines.flash4 import NAME as FLASH4_RING
from ..baselines.flash4 import require_flash4
from ..data.shards import TokenData
from ..pattern.by_layer import (
    pattern_of_selector,
    planned_selector,
    selector_by_rules,
    selector_words,
)
from ..pattern.documents import FIELD, columns_needed, require_blocks, require_columns
from ..pattern.section import PatternSection
from .config import ChooseSection, TrainConfig


def dense_plan(config: TrainConfig, shape: ModelShape) -> Plan:
    """Return the zigzag plan that a run is compared with, as if its attention were dense and of one document."""
    return _zigzag_plan(config, shape, "triton")


def resolve_plan(
    config: TrainConfig, shape: ModelShape, *, device: str, data: TokenData | None = None
) -> tuple[Plan, Trace | None, str | None]:
    """Return the plan, the trace that it replays (if it does), and one line about a plan that no file gave.

    data: of the run, where there is any yet: its packed documents must fit what the plan's patterns are chosen by.

    All is checked against configuration and model before any GPU work: InputError in one line. Dense baselines that
    are not planned get a plan for its zigzag placement alone.
    """
    backend = config.plan.backend or ("triton" if device == "cuda" else "blockwise")
    if config.attention == FLASH4_RING:
        require_flash4(device, dtype=getattr(torch, config.dtype), head_dim=shape.head_dim)
    if config.attention in ("dense-zigzag", FLASH4_RING, "torch-context-parallel"):
        _require_plain(config, shape)
        return _zigzag_plan(config, shape, backend), None, f"{config.attention}, zigzag placement"
    if config.plan.file is not None:
        plan, trace = _from_file(config, shape, config.plan.file)
        made_here = None
    else:
        plan, trace = _default_plan(config, shape, backend, data), None
        pattern = plan.pattern
        words = "dense, every diagonal" if config.attention == "dense" else selector_words(pattern)
        made_here = f"striped placement, layout {plan.forward.value}, {backend} kernels, pattern: {words}"
    if config.data.documents.attention:
        _require_documents(plan, data)
    if config.plan.choose.sometimes_dense and not plan.active_pairs().covers(causal_pairs(plan.make_placement())):
        raise InputError("the plan leaves out pairs of shards, which a dense step needs", source=config.plan.file,
                         field="plan.choose")  # fmt: skip
    return plan, trace, made_here


def _require_documents(plan: Plan, data: TokenData | None) -> None:
    """Raise UnsupportedError where something in a plan cannot keep packed documents apart."""
    keeping = [name for name, kind in selectors().items() if kind.keeps_documents]
    if plan.pattern.source != "choose":
        raise UnsupportedError("a replayed trace does not choose for each document", field=FIELD)
    asked = _asked(planned_selector(plan.pattern, layers=plan.model.layers), plan.model, plan.seq_len_tokens)
    for one in asked:
        if not one.keeps_documents:
            raise UnsupportedError(f"{one.name!r} does not choose per document; {', '.join(keeping)} and dense "
                                   "attention do", field=FIELD)  # fmt: skip
    if data is not None:
        packed, size = data.packed(plan.seq_len_tokens), plan.block_size
        require_blocks(asked, packed, block_size=size)
        require_columns(asked, packed, block_size=size, columns_capacity=plan.columns_capacity)
    chunks = [tokens for tokens in plan.model.chunks or () if 0 < tokens < plan.seq_len_tokens]
    if chunks:
        raise UnsupportedError(f"is on, and the model attends in chunks of {chunks[0]} tokens: where they begin in "
                               "documents is not known", field=FIELD)  # fmt: skip


def _asked(selector: Selector, model: ModelShape, seq_len_tokens: int) -> list[Selector]:
    """Return what chooses for the layers that the model does not limit by itself, each once."""
    layers = [layer for layer in range(model.layers) if not model.limits(layer, seq_len_tokens)]
    return list(dict.fromkeys(selector.of_head(layer, 0) for layer in layers))


def _from_file(config: TrainConfig, shape: ModelShape, file: Path) -> tuple[Plan, Trace | None]:
    plan = load_plan(file)
    try:
        plan.require(
            world_size=config.parallel.context, model=shape, seq_len_tokens=config.seq_len_tokens, dtype=config.dtype
        )
        if config.plan.backend not in (None, plan.kernels.backend):
            raise InputError(f"the plan says {plan.kernels.backend!r}, the configuration {config.plan.backend!r}",
                             field="plan.backend")  # fmt: skip
    except InputError as error:
        raise type(error)(str(error), source=file) from error
    trace = None
    if plan.pattern.source == "trace":
        if config.plan.trace is None:
            raise InputError("the plan replays a trace: give it", field="plan.trace")
        if config.plan.choose != ChooseSection():
            raise InputError("the plan replays a trace: nothing is chosen", source=file, field="plan.choose")
        trace = Trace.open(config.plan.trace)
        if plan.pattern.trace_sha256 not in (None, trace.digest()):
            raise InputError(f"is {trace.digest()[:16]}…, the plan was made for {str(plan.pattern.trace_sha256)[:16]}…",
                             source=config.plan.trace, field="digest")  # fmt: skip
        if missing := sorted(set(range(shape.layers)) - set(trace.layers)):
            raise InputError(f"lacks layers {missing}: all are replayed", source=config.plan.trace, field="layers")
        if not trace.steps:
            raise InputError("holds no training step", source=config.plan.trace)
        if trace.documents(trace.steps[-1]) is not None:
            raise UnsupportedError("is of packed documents: replayed, their ends would be laid over other data",
                                   source=config.plan.trace)  # fmt: skip
    elif config.plan.trace is not None:
        raise InputError("the plan chooses its patterns and replays no trace", field="plan.trace")
    else:
        planned_selector(plan.pattern, layers=shape.layers)
    return plan, trace


def _default_plan(config: TrainConfig, shape: ModelShape, backend: str, data: TokenData | None) -> Plan:
    _require_kernels(backend, config, shape)
    if config.attention == "dense":
        selector: Selector = dense(config.seq_len_tokens)
    else:
        selector = _selector(config.plan.pattern, shape.layers)
    placement = striped(
        seq_len_tokens=config.seq_len_tokens, world_size=config.parallel.context,
        granularity_tokens=config.plan.block_size,
    )  # fmt: skip
    columns_capacity = min(selector.most_columns, config.seq_len_tokens)
    if config.data.documents.attention and data is not None:
        asked = _asked(selector, shape, config.seq_len_tokens)
        columns_capacity = columns_needed(asked, data.packed(config.seq_len_tokens), block_size=config.plan.block_size)
    try:
        return _plan(config, shape, backend, placement, config.plan.make_layout(), selector, columns_capacity)
    except InputError as error:
        raise type(error)(str(error), field="plan.layout_parameters") from error


def _zigzag_plan(config: TrainConfig, shape: ModelShape, backend: str) -> Plan:
    chunks = 2 * config.parallel.context
    if config.seq_len_tokens % chunks:
        raise UnsupportedError(f"{config.seq_len_tokens} is no multiple of {chunks} (2 × context), and "
                               f"{config.attention!r} does not pad", field="seq_len_tokens")  # fmt: skip
    if config.attention == "torch-context-parallel" and config.device == "cpu":
        raise UnsupportedError("'torch-context-parallel' needs GPUs", field="attention")
    try:
        _require_kernels(backend, config, shape)
    except UnsupportedError:
        backend = "blockwise"  # the plan only names kernels, which nothing follows: these take any heads
    placement = zigzag(
        seq_len_tokens=config.seq_len_tokens, world_size=config.parallel.context,
        granularity_tokens=config.seq_len_tokens // chunks,
    )  # fmt: skip
    return _plan(config, shape, backend, placement, Ring(), dense(config.seq_len_tokens), 0)


def _require_plain(config: TrainConfig, shape: ModelShape) -> None:
    """Raise UnsupportedError where attention is to be more than causal softmax, which is what baselines compute."""
    if config.data.documents.attention:
        raise UnsupportedError(f"{config.attention!r} cannot keep documents apart", field="data.documents.attention")
    for layer in range(shape.layers):
        if own := shape.limits(layer, config.seq_len_tokens):
            told = f"{config.attention!r} has no windows or chunks; the model's layer {layer} has {own}"
            raise UnsupportedError(told, field="attention")
    if shape.softcap is not None:
        raise UnsupportedError(f"{config.attention!r} has no softcap; the model's is {shape.softcap}",
                               field="attention")  # fmt: skip


def _require_kernels(backend: str, config: TrainConfig, shape: ModelShape) -> None:
    """Raise UnsupportedError where the kernels do not take the model's heads."""
    computed_head_dim(backend, head_dim=shape.head_dim, dtype=config.dtype, block_size=config.plan.block_size)


def _plan(
    config: TrainConfig, shape: ModelShape, backend: str, placement: Placement, layout: Layout, selector: Selector,
    columns_capacity: int,
) -> Plan:  # fmt: skip
    plan = make_plan(
        attention=AttentionSpec(
            model=shape, seq_len_tokens=config.seq_len_tokens, block_size=config.plan.block_size, dtype=config.dtype,
            columns_capacity=columns_capacity,
        ),
        placement=placement, forward=layout,
        pattern=pattern_of_selector(
            selector, shape, seq_len_tokens=config.seq_len_tokens, packed=config.data.documents.attention
        ),
        kernels=KernelSpec.model_validate({"backend": backend}),
    )  # fmt: skip
    return plan.with_record(provenance={"made_by": "sparsering train"})


def _selector(section: PatternSection, layers: int) -> Selector:
    try:
        return selector_by_rules(section, layers=layers)
    except InputError as error:
        raise InputError(str(error), field="plan.pattern") from error
