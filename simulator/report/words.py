"""How the pages write numbers."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from .figures.theme import PALETTE

ROLES = {light: role for role, (light, _) in PALETTE.items()}


def duration(us: float) -> str:
    """Return a time with three digits or so and the unit that suits it."""
    if us >= 1e6:
        return f"{us / 1e6:.2f} s"
    if us >= 1e3:
        return f"{us / 1e3:.0f} ms" if us >= 1e5 else f"{us / 1e3:.1f} ms"
    return f"{us:.0f} µs"


def milliseconds(us: float) -> str:
    """Return a time in milliseconds without the unit, for tables: three digits or so."""
    return f"{us / 1e3:,.1f}" if us >= 1e4 else f"{us / 1e3:.3f}"


def percent(share: float) -> str:
    """Return a share in per cent: whole ones from 10, one digit below."""
    return f"{share:.0%}".replace("%", " %") if abs(share) >= 0.0995 else f"{share:.1%}".replace("%", " %")


def error(value: float) -> str:
    """Return a small number in powers of ten."""
    return f"{value:.1e}".replace("-", "−")


def or_dash(shown: Callable[[Any], str]) -> Callable[[Any], str]:
    """Return what writes a value, and a dash for None."""
    return lambda value: "–" if value is None else shown(value)


def signed_percent(share: float) -> str:
    """Return a share in whole per cent with its sign."""
    return "0 %" if abs(share) < 0.005 else f"{share:+.0%}".replace("-", "−").replace("%", " %")


def unbroken(text: str) -> str:
    """Return a text whose numbers and units stay on one line."""
    return re.sub(r"(?<=\d) (?=(%|µs|ms|s|GPUs?|GPU-hours|steps|tokens)\b|%)", "\u00a0", text)


FILTERS: dict[str, Callable[[Any], str]] = {
    "ms": or_dash(lambda us: f"{us / 1e3:,.1f}"),
    "milli": or_dash(milliseconds),
    "role": ROLES.__getitem__,
    "duration": or_dash(duration),
    "percent": or_dash(percent),
    "signed_percent": signed_percent,
    "error": error,
    "unbroken": unbroken,
    "whole": or_dash("{:,.0f}".format),
    "fixed": or_dash("{:,.3f}".format),
    "hours": or_dash("{:,.3g}".format),
}
