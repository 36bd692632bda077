"""What a writer of metrics is. A further one is a class with these two methods, and a line in `opened.py`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol


class NotWritten(RuntimeError):
    """What a run has to keep cannot be written: a disk is full, or gone. Names step, rank and reason in one line."""


class MetricWriter(Protocol):
    """Takes what was measured of a step: names and JSON values, where a list has one value per layer."""

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Write the values of one step; steps come in ascending order."""
        ...

    def close(self) -> None:
        """Write what is still held back, and end."""
        ...


def scalars(values: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield every number by its name, and those of lists (one value a layer) as `name/000`, `name/001`."""
    for name, value in values.items():
        numbered = enumerate(value) if isinstance(value, list) else ()
        for tag, number in ((name, value), *((f"{name}/{place:03d}", entry) for place, entry in numbered)):
            if isinstance(number, int | float) and name != "step":
                yield tag, number
