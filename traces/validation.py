"""What pydantic refuses, as one line that names file, field and value."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from .errors import InputError, field_name, shown

Model = TypeVar("Model", bound=BaseModel)


def validated(
    model: type[Model], value: object, source: str | Path | None, *, newest_schema: int | None = None
) -> Model:
    """Return `value` as the pydantic `model`; InputError, in one line, for a newer `schema_version` and any problem."""
    version = value.get("schema_version") if isinstance(value, dict) else None
    if newest_schema is not None and isinstance(version, int) and version > newest_schema:
        raise InputError(
            f"is {version}; this version reads up to {newest_schema}", source=source, field="schema_version"
        )
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise validation_error(error, source) from error


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
