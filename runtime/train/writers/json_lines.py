"""One JSON object per line, written line by line: what is written survives the process."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class JsonLines:
    """Appends to `rank-00000.jsonl` and so on: every rank has a file of its own. OSError where it cannot."""

    def __init__(self, folder: Path, *, rank: int) -> None:
        self._rank = rank
        path = folder / f"rank-{rank:05d}.jsonl"
        _cut_torn_line(path)
        self._file = path.open("ab", buffering=0)  # what a full disk refused must not wait for `close` to fail again

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Append one line; ValueError for NaN and infinity."""
        line = (json.dumps({"rank": self._rank} | dict(values), allow_nan=False) + "\n").encode()
        while line:
            line = line[self._file.write(line) :]

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _cut_torn_line(path: Path) -> None:
    """Remove what a run that was killed, or met a full disk, left of a last line; the next would be added to it."""
    if not path.is_file():
        return
    with path.open("r+b") as file:
        end = file.seek(0, os.SEEK_END)
        whole = end
        while whole and file.seek(whole - 1) >= 0 and file.read(1) != b"\n":
            whole -= 1
        if whole < end:
            file.truncate(whole)
