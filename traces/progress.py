"""Progress of commands, on standard error: nothing for what is done in two seconds, a bar for what takes longer."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeAlias

# stage, how much of it is done, how much there is
Progress: TypeAlias = Callable[[str, int, int], None]

PATIENCE_SECONDS = 2.0


def no_progress(stage: str, done: int, total: int) -> None:
    """Show nothing."""


@contextmanager
def shown_progress() -> Iterator[Progress]:
    """Yield a callback that draws a bar and the time left for each stage, on a terminal, after two seconds of work."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    console = Console(stderr=True)
    parts = TextColumn("{task.description}"), BarColumn(bar_width=None), MofNCompleteColumn(), TimeElapsedColumn()
    left = TextColumn("left"), TimeRemainingColumn(elapsed_when_finished=False)
    bars = Bars(*parts, *left, console=console, transient=True)
    tasks: dict[str, TaskID] = {}
    began = time.monotonic()

    def show(stage: str, done: int, total: int) -> None:
        if not console.is_terminal or time.monotonic() - began < PATIENCE_SECONDS:
            return
        if not bars.live.is_started:
            bars.start()
        if stage not in tasks:
            tasks[stage] = bars.add_task(stage, total=total)
        bars.update(tasks[stage], completed=done, total=total)

    try:
        yield show
    finally:
        if bars.live.is_started:
            bars.stop()
