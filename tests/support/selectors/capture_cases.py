"""Captures of tiny models, for tests."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sparsering.runtime.hf.capture import CaptureSettings, capture_model, trace_header
from sparsering.runtime.pattern.selectors import make_selector
from sparsering.traces.dataset.store import Trace
from sparsering.traces.dataset.writer import TraceWriter

SEQ_LEN, BLOCK = 500, 64
VERTICAL_SLASH = make_selector("vertical-slash", {"columns": 40, "slashes": 60, "sink_tokens": 4, "window_tokens": 10})


def token_ids(seed: int = 0, length: int = SEQ_LEN) -> Tensor:
    return torch.randint(0, 97, (length,), generator=torch.Generator().manual_seed(seed))


def captured(folder: Path, model: PreTrainedModel, *, layers: tuple[int, ...] | None = None, **settings: Any) -> Trace:
    header = trace_header(model, model_id="tiny", seq_len_tokens=SEQ_LEN, block_size=BLOCK, layers=layers)
    with TraceWriter(folder, header) as writer:
        capture_model(model, token_ids(), writer, CaptureSettings(**{"selector": VERTICAL_SLASH, **settings}))
    trace = Trace.open(folder)
    trace.verify()
    return trace


def body(model: PreTrainedModel) -> Any:
    return model.base_model


@contextmanager
def last_hidden(model: PreTrainedModel) -> Iterator[list[Tensor]]:
    found: list[Tensor] = []
    hook = body(model).norm.register_forward_hook(lambda module, inputs, output: found.append(output))
    try:
        yield found
    finally:
        hook.remove()
