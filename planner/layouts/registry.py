"""The one place that knows layouts by name. Importing a layout's file registers it; `layouts/` imports its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import TypeVar

from ...traces.errors import InputError, did_you_mean, unknown_name
from .layout import Layout

L = TypeVar("L", bound=Layout)
_KNOWN: dict[str, type[Layout]] = {}


def register(layout: type[L]) -> type[L]:
    """Make a layout known by its name: a class decorator. ValueError where another class has that name."""
    known = _KNOWN.setdefault(layout.name, layout)
    if known.__qualname__ != layout.__qualname__:
        raise ValueError(f"{layout.name!r} is the name of two layouts, {known.__qualname__} and {layout.__qualname__}")
    return layout


def known_layouts() -> tuple[type[Layout], ...]:
    """Return all registered layouts, the plainest first."""
    return tuple(sorted(_KNOWN.values(), key=lambda layout: layout.plainness))


def layout_names() -> tuple[str, ...]:
    """Return the names of all registered layouts, the plainest first."""
    return tuple(layout.name for layout in known_layouts())


def make_layout(name: str, parameters: Mapping[str, object] | None = None) -> Layout:
    """Return a layout by name and parameters: as plan files and configurations give it.

    Raises InputError, naming the field and its value, for an unknown name or parameter, a missing or a wrong one.
    """
    if name not in _KNOWN:
        raise unknown_name(name, layout_names(), field="layout")
    layout, given = _KNOWN[name], dict(parameters or {})
    needed = {field.name: field.default is MISSING for field in fields(layout)}
    for parameter in given:
        if parameter not in needed:
            known = f"it has {', '.join(needed)}{did_you_mean(parameter, needed)}" if needed else "it has none"
            raise InputError(f"is no parameter of {name!r}: {known}", field=parameter)
    for parameter, missing in needed.items():
        if missing and parameter not in given:
            raise InputError(f"is missing for {name!r}", field=parameter)
    return layout(**given)


def parse_layout(text: str) -> Layout:
    """Return a layout from text, such as ring:prefetch=2 or gather:chunks=1,pull; a name alone is true.

    Raises InputError as `make_layout` does, and for a number that is none.
    """
    name, _, rest = text.partition(":")
    return make_layout(name, dict(_parameter(one) for one in rest.split(",") if one))


def _parameter(text: str) -> tuple[str, bool | int]:
    name, given, value = text.partition("=")
    if not given:
        return name, True
    try:
        return name, int(value)
    except ValueError as error:
        raise InputError(f"{value!r} is not a whole number", field=name) from error
