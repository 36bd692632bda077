"""What pydantic refuses, as one line that names file, field and value."""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError

from .errors import InputError, field_name, shown


def validation_error(error: ValidationError, source: str | Path | None) -> InputError:
    """Return pydantic's most telling complaint as one line that names file, field and value.

    An unknown key comes first: a misspelt one is also missing where it was meant. What is missing comes last.
    """
    ranks = {"extra_forbidden": 0, "missing": 2}
    first = min(error.errors(), key=lambda one: ranks.get(one["type"], 1))
    place = field_name(first["loc"]) or None
    if first["type"] == "missing":
        return InputError("is missing", source=source, field=place)
    own = first["type"] == "value_error"  # of our own checks, which name the value themselves
    problem = first["msg"].removeprefix("Value error, ") if own else f"{first['msg']}, not {shown(first['input'])}"
    return InputError(problem, source=source, field=place)
