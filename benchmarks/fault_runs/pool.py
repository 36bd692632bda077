"""Several runs at a time, by processes that share one import of torch: most of a run is waiting."""

from __future__ import annotations

import json
import os
import select
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any

NUMBER_BYTES = 4


def in_processes(
    numbers: Sequence[int], work: Callable[[int], dict[str, Any]], *, processes: int
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """Call `work` for every number, in so many forked processes, and yield what it returns as it comes.

    An exception in it is a result {"number": …, "error": the traceback}.
    """
    queue, filled = os.pipe()
    os.write(filled, b"".join(number.to_bytes(NUMBER_BYTES) for number in numbers))
    os.close(filled)
    outputs: dict[int, bytes] = {}
    children: list[int] = []
    for _ in range(min(processes, len(numbers))):
        ours, theirs = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                _serve(queue, theirs, work)
            finally:
                os._exit(0)
        os.close(theirs)
        outputs[ours] = b""
        children.append(child)
    os.close(queue)
    try:
        while outputs:
            for output in select.select(list(outputs), [], [])[0]:
                part = os.read(output, 1 << 16)
                *lines, outputs[output] = (outputs[output] + part).split(b"\n")
                yield from map(json.loads, lines)
                if not part:
                    del outputs[output]
                    os.close(output)
    finally:
        for child in children:
            with suppress(ProcessLookupError):
                if outputs:
                    os.kill(child, 15)
            os.waitpid(child, 0)


def _serve(queue: int, output: int, work: Callable[[int], dict[str, Any]]) -> None:
    while number := os.read(queue, NUMBER_BYTES):
        try:
            result = work(int.from_bytes(number))
        except Exception:
            result = {"number": int.from_bytes(number), "error": traceback.format_exc()}
        line = json.dumps(result).encode() + b"\n"
        while line:
            line = line[os.write(output, line) :]
