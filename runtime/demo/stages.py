"""What the demo shows while it works: one line per stage, a bar or a spinner while it lasts. On standard error."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, SpinnerColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars


@dataclass(eq=False)
class Stage:
    """A stage under way. Call it as (what, done, total) for a bar; set `said` for its closing line."""

    title: str
    bars: Bars
    said: str = ""

    def __call__(self, what: str, done: int, total: int) -> None:
        """Show how far the stage is."""
        shown = f"{self.title}: {what}" if what else self.title
        self.bars.update(self.bars.task_ids[0], description=escape(shown), completed=done, total=total)


@dataclass(eq=False)
class Stages:
    """The demo's stages, numbered; `seconds` is what each took. Quiet where nobody looks, but for the closing lines."""

    total: int
    console: Console = field(default_factory=lambda: Console(stderr=True, highlight=False))
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, title: str) -> Iterator[Stage]:
        """Show a spinner (and a bar, once the stage knows how far it is) until the block ends, then one line."""
        number, began = len(self.seconds) + 1, time.monotonic()
        described = TextColumn(f"[dim]{number}/{self.total}[/dim] {{task.description}}")
        columns = SpinnerColumn(), described, BarColumn(bar_width=24), TaskProgressColumn(), TimeElapsedColumn()
        with Bars(*columns, console=self.console, transient=True, disable=not self.console.is_terminal) as bars:
            bars.add_task(escape(title), total=None)
            stage = Stage(title=title, bars=bars)
            yield stage
        self.seconds[title] = time.monotonic() - began
        said = f"  [dim]{escape(stage.said)}[/dim]" if stage.said else ""
        self.console.print(
            f"[green]✓[/green] [dim]{number}/{self.total}[/dim] {escape(title)}{said} "
            f"[dim]({self.seconds[title]:.1f} s)[/dim]",
            soft_wrap=True,
        )
