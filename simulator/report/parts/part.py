"""What a part of the page is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from markupsafe import Markup

from ..figures.theme import Figure, html_of


@dataclass(frozen=True, kw_only=True)
class Part:
    """A part under a heading: the template `part_<template>.html` and what it may use, as `part.values`."""

    template: str
    title: str
    values: Mapping[str, Any] = field(default_factory=dict)


def drawing(name: str, figure: Figure, label: str) -> Markup:
    """Return a figure for a template. label: what it shows, for those who do not see it."""
    return Markup(html_of(name, figure, label))
