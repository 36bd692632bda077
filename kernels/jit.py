"""One door to Triton launches: its decorator keeps the kernel's own function type, which type checkers then believe."""

from __future__ import annotations

from typing import Any


def run(kernel: Any, grid: tuple[int, ...], *arguments: Any, **named: Any) -> None:
    """Launch kernel[grid](*arguments, **named)."""
    kernel[grid](*arguments, **named)
