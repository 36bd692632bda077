"""Writing traces: only what fits, by one writer at a time, and readable after a crash at any moment."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import tiny
from sparsering.traces.dataset import writer as writing
from sparsering.traces.dataset.manifest import ModelShape
from sparsering.traces.dataset.store import Trace
from sparsering.traces.dataset.writer import TraceWriter
from sparsering.traces.errors import InputError
from sparsering.traces.pattern import LayerPattern


def test_a_trace_is_continued_by_the_same_header_only(trace_folder: Path) -> None:
    with TraceWriter(trace_folder, tiny.trace_header()) as writer:
        assert writer.next_step == 6
        writer.append(writer.next_step, tiny.layer_records(4))
    assert Trace.open(trace_folder).steps == (0, 5, 6)
    changes = {
        "seq_len_tokens": 201,
        "block_size": 8,
        "recorded_layers": (0, 2),
        "origin": "real",
        "model": ModelShape(model_id="tiny", layers=4, heads=6, kv_heads=1, head_dim=8),
    }
    for name, value in changes.items():
        with pytest.raises(InputError, match=rf"manifest.json: {name}(\.heads)?: "):
            TraceWriter(trace_folder, tiny.trace_header(**{name: value}))


def test_one_writer_at_a_time(trace_folder: Path) -> None:
    with (
        TraceWriter(trace_folder, tiny.trace_header()),
        pytest.raises(InputError, match="being written by another process"),
    ):
        TraceWriter(trace_folder, tiny.trace_header())
    TraceWriter(trace_folder, tiny.trace_header()).close()


def test_a_folder_of_other_things_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match=r"thesis\.tex"):
        TraceWriter(tmp_path, tiny.trace_header())
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_what_does_not_fit_is_not_written(trace_folder: Path) -> None:
    before = sorted(path.name for path in trace_folder.iterdir())
    wrong_length = LayerPattern(
        seq_len_tokens=tiny.TRACE_TOKENS - 1, block_size=tiny.TRACE_BLOCK, heads=tiny.layer_pattern(0).heads[:2] * 2
    )
    with TraceWriter(trace_folder, tiny.trace_header()) as writer:
        for message, step, content in (
            ("5 does not follow 5", 5, tiny.layer_records(0)),
            ("layer 1 is missing", 6, {0: tiny.layer_records(0)[0]}),
            ("layer 1 was appended where 0 is expected", 6, {1: tiny.layer_records(0)[1]}),
            ("layer 2 was appended where nothing", 6, tiny.layer_records(0) | {2: tiny.layer_records(0)[1]}),
            ("layer 0, heads: the pattern has 4, the trace 3", 6, {0: (wrong_length, [tiny.CHOICE] * 4)}),
            ("2 entries for 3 heads", 6, {0: (tiny.layer_pattern(0), [tiny.CHOICE] * 2)}),
            (
                "share their documents",
                6,
                {
                    0: tiny.layer_records(0)[0],
                    1: (tiny.layer_pattern(1, documents=True), [tiny.CHOICE] * tiny.TRACE_HEADS),
                },
            ),
        ):
            with pytest.raises(InputError, match=message):
                writer.append(step, content)
        with pytest.raises(ZeroDivisionError), writer.step(6) as step:
            step.append(0, *tiny.layer_records(0)[0])
            raise ZeroDivisionError
    assert sorted(path.name for path in trace_folder.iterdir()) == before
    assert Trace.open(trace_folder).steps == (0, 5)


def test_a_crash_between_part_and_manifest(trace_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(*_: Any) -> None:
        raise KeyboardInterrupt

    with TraceWriter(trace_folder, tiny.trace_header()) as writer, monkeypatch.context() as patch:
        patch.setattr(writing, "write_manifest", crash)
        with pytest.raises(KeyboardInterrupt):
            writer.append(6, tiny.layer_records(6))
    assert Trace.open(trace_folder).unlisted_parts == ()  # an exception is no kill -9, which leaves the part there:
    (trace_folder / "part-00000006.parquet").write_bytes(b"of a writer that was killed")
    trace = Trace.open(trace_folder)
    trace.verify()
    assert (trace.steps, trace.unlisted_parts) == ((0, 5), ("part-00000006.parquet",))
    with TraceWriter(trace_folder, tiny.trace_header()) as writer:
        writer.append(6, tiny.layer_records(7))
    trace = Trace.open(trace_folder)
    assert (trace.steps, trace.unlisted_parts) == ((0, 5, 6), ())
    tiny.assert_same_layer(trace.layer_pattern(6, 0), tiny.layer_pattern(7))


ENDLESS_WRITER = """
import sys
from sparsering.traces.synthetic import SyntheticSettings, write_synthetic_trace
settings = SyntheticSettings(seq_len_tokens=16384, heads=16)
write_synthetic_trace(sys.argv[1], "vertical-slash", settings, layers=4, steps=100_000)
"""


@pytest.mark.parametrize("delay_seconds", [0.0, 0.05])
def test_a_killed_writer_leaves_a_readable_trace(tmp_path: Path, delay_seconds: float) -> None:
    folder = tmp_path / "trace"
    writer = subprocess.Popen([sys.executable, "-c", ENDLESS_WRITER, str(folder)])
    try:
        deadline = time.monotonic() + 60
        while len(list(folder.glob("part-*.parquet"))) < 2 and time.monotonic() < deadline and writer.poll() is None:
            time.sleep(0.01)
        time.sleep(delay_seconds)
    finally:
        writer.send_signal(signal.SIGKILL)
        writer.wait()
    trace = Trace.open(folder)
    trace.verify()
    assert trace.steps and trace.steps == tuple(range(len(trace.steps)))
    with TraceWriter(folder, trace.header) as again:  # the lock went with the process
        assert again.next_step == len(trace.steps)
    assert not list(folder.glob(".*.partial"))
