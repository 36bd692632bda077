"""What pydantic refuses, as one line that names file, field and value."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from .errors import InputError, did_you_mean, field_name, shown

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
        raise validation_error(error, source, model) from error


def validation_error(
    error: ValidationError, source: str | Path | None, model: type[BaseModel] | None = None
) -> InputError:
    """Return pydantic's most telling complaint as one line that names file, field and value.

    An unknown key comes first: a misspelt one is also missing where it was meant. What is missing comes last.
    model: what was read; the nearest key that it has is named beside an unknown one.
    """
    ranks = {"extra_forbidden": 0, "missing": 2}
    first = min(error.errors(), key=lambda one: ranks.get(one["type"], 1))
    place = field_name(first["loc"]) or None
    return InputError(_problem(first, model), source=source, field=place)


def _problem(found: ErrorDetails, model: type[BaseModel] | None) -> str:
    value = found["input"]
    if found["type"] == "missing":
        return "is missing"
    if found["type"] == "value_error":  # of our own checks, which name the value themselves
        return found["msg"].removeprefix("Value error, ")
    if found["type"] in ("model_type", "model_attributes_type", "dict_type"):
        return f"must be a mapping of keys, not {shown(value)}"
    if found["type"] == "literal_error":
        known = found.get("ctx", {}).get("expected", "")
        return f"must be {known}, not {shown(value)}{did_you_mean(value, known.split(chr(39))[1::2])}"
    if found["type"] == "extra_forbidden":
        keys = [] if model is None else sorted(_keys(model, found["loc"][:-1]))
        return f"unknown key (its value is {shown(value)}){did_you_mean(found['loc'][-1], keys) or _listed(keys)}"
    return f"{found['msg']}, not {shown(value)}"


def _listed(keys: Sequence[str]) -> str:
    return f"; known here: {', '.join(keys)}" if keys else ""


def _keys(model: type[BaseModel], place: Sequence[str | int]) -> set[str]:
    """Return the keys of the part of a model that `place` leads to; of all parts that it may lead to."""
    models = {model}
    for step in place:
        fields = (one.model_fields[str(step)] for one in models if str(step) in one.model_fields)
        found = {part for one in fields for part in _models(one.annotation)}
        models = found or models  # a number in a list, a key of a mapping: its values' models are known already
    return {key for one in models for key in one.model_fields}


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    """Yield the models that a field's type names, also within unions, lists and mappings."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _models(part)
