"""One JSON object per line, flushed line by line: what is written survives the process."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class JsonLines:
    """Appends to `rank-00000.jsonl` and so on: every rank has a file of its own. OSError where it cannot."""

    def __init__(self, folder: Path, *, rank: int) -> None:
        self._rank = rank
        self._file = (folder / f"rank-{rank:05d}.jsonl").open("a", encoding="utf-8")

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Append one line; ValueError for NaN and infinity."""
        self._file.write(json.dumps({"rank": self._rank} | dict(values), allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()
