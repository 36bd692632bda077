"""Timelines as Holistic Trace Analysis reads them: one file per rank, in the form of torch.profiler's traces.

What Holistic Trace Analysis (HTA) needs, and what is done about it:

- `"rank": N` of `distributedInfo` stands before anything else of that name, with a space after the colon: HTA finds a
  file's rank by searching its lines for it.
- GPU work is an event with `args.stream` from 1 on and `args.correlation`; a transfer is told from computation by
  its name, which must begin with `ncclKernel`.
- Every kernel has a launch (`cudaLaunchKernel`, no stream) of the same correlation. A timeline does not know when the
  host launched, so a launch is put where its stream became free: HTA finds idle time, and none of it waiting for the
  host.
- Times are whole microseconds: HTA rounds others inwards, span by span, which would make gaps between spans that
  touch. Each moment is rounded here, so what touches still does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from ..dataset.whole_folder import whole_folder
from ..files import write_json
from ..timeline import COMPUTE_STREAM, Span, Timeline

HOST_THREAD = 1
FIRST_STREAM = 7  # as CUDA's default stream is numbered in torch.profiler's traces


def hta_documents(timeline: Timeline) -> Iterator[dict[str, Any]]:
    """Yield one trace object per rank, in order; a rank without spans has one without events of its own."""
    names = sorted({span.stream for span in timeline.spans} - {COMPUTE_STREAM})
    streams = {name: FIRST_STREAM + place for place, name in enumerate([COMPUTE_STREAM, *names])}
    spans: dict[int, list[Span]] = {rank: [] for rank in range(timeline.world_size)}
    for span in timeline.spans:
        spans[span.rank].append(span)
    for rank, own in spans.items():
        yield {
            "schemaVersion": 1,
            "distributedInfo": {"rank": rank, "world_size": timeline.world_size, "backend": "nccl"},
            "displayTimeUnit": "ms",
            "traceEvents": [*_names(rank, streams), *_events(rank, own, streams)],
        }


def write_hta(timeline: Timeline, folder: Path) -> list[Path]:
    """Write `rank-00000.json.gz` and so on into a new or empty folder: all files or none. Returns their paths.

    Raises InputError where the folder holds anything or cannot be written.
    """
    names = [f"rank-{rank:05d}.json.gz" for rank in range(timeline.world_size)]
    with whole_folder(folder) as working:
        for name, document in zip(names, hta_documents(timeline), strict=True):
            write_json(working / name, document)
    return [folder / name for name in names]


def _names(rank: int, streams: dict[str, int]) -> Iterator[dict[str, Any]]:
    """Yield what the process and its threads are called."""
    yield {"ph": "M", "name": "process_name", "pid": rank, "tid": 0, "args": {"name": f"rank {rank}"}}
    for name, number in {"host": HOST_THREAD, **streams}.items():
        yield {"ph": "M", "name": "thread_name", "pid": rank, "tid": number, "args": {"name": name}}


def _events(rank: int, spans: Sequence[Span], streams: dict[str, int]) -> Iterator[dict[str, Any]]:
    """Yield kernels, stream by stream in order of time, each after its launch."""
    correlation = 0
    ordered = sorted(spans, key=lambda span: (streams[span.stream], span.start_us, span.end_us))
    for stream, group in groupby(ordered, key=lambda span: streams[span.stream]):
        free_us: int | None = None
        for span in group:
            correlation += 1
            start_us, end_us = round(span.start_us), round(span.end_us)
            launched_us = start_us if free_us is None else min(free_us, start_us)
            yield _launch(rank, launched_us, correlation)
            yield _kernel(span, stream, start_us, end_us, correlation)
            free_us = end_us if free_us is None else max(free_us, end_us)


def _launch(rank: int, time_us: int, correlation: int) -> dict[str, Any]:
    return {
        "ph": "X", "cat": "cuda_runtime", "name": "cudaLaunchKernel", "pid": rank, "tid": HOST_THREAD,
        "ts": time_us, "dur": 0, "args": {"correlation": correlation},
    }  # fmt: skip


def _kernel(span: Span, stream: int, start_us: int, end_us: int, correlation: int) -> dict[str, Any]:
    label = f"{span.direction} {span.name}"
    arguments = {"stream": stream, "correlation": correlation, "device": span.rank}
    said = {"phase": span.phase, "direction": span.direction, "nbytes": span.nbytes}
    return {
        "ph": "X", "cat": "kernel", "name": label if span.category == "compute" else f"ncclKernel {label}",
        "pid": span.rank, "tid": stream, "ts": start_us, "dur": end_us - start_us, "args": arguments | said,
    }  # fmt: skip
