"""What the tests of traces share."""

from __future__ import annotations

from pathlib import Path

import pytest

import tiny
from sparsering.traces.dataset.writer import TraceWriter


@pytest.fixture
def trace_folder(tmp_path: Path) -> Path:
    """A trace of training steps 0 and 5."""
    with TraceWriter(tmp_path / "trace", tiny.trace_header()) as writer:
        writer.append(0, tiny.layer_records(0))
        writer.append(5, tiny.layer_records(10))
    return tmp_path / "trace"
