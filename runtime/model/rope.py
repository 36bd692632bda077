"""Checking what a configuration says of rotary embeddings: transformers warns of some mistakes and fails late."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ...traces.errors import InputError, printable, shown, unknown_name

KNOWN = ("default", *ROPE_INIT_FUNCTIONS)
OF_ONE_MODEL = ("mrope", "su")  # older names that transformers translates
NUMBERS = ("factor", "rope_theta", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow")


def check_rope(document: Any, *, source: Path | str) -> None:
    """Raise InputError for an unknown kind of rotary embedding, and for a value that is no positive number.

    document: a model's configuration as JSON values; rope parameters may lie in it, in its parts, or by kind of layer.
    """
    for key, section in _sections(document):
        kind = section.get("rope_type", section.get("type", "default"))
        if kind not in KNOWN and kind not in OF_ONE_MODEL:
            raise unknown_name(kind, KNOWN, source=source, field=f"{key}.rope_type")
        for name in NUMBERS:
            value = section.get(name)
            if value is not None and (type(value) not in (int, float) or not value > 0):
                raise InputError(f"must be a positive number, not {shown(value)}", source=source, field=f"{key}.{name}")


def replace_rope(config: Any, rope_parameters: Mapping[str, Any], *, source: Path | str) -> None:
    """Put other rotary embeddings in the place of a transformers configuration's own. InputError in one line.

    source: of the configuration, which errors name.
    """
    check_rope({"rope_parameters": dict(rope_parameters)}, source="model")
    try:
        config.rope_parameters = dict(rope_parameters)
        config.standardize_rope_params()
        config.validate_rope()
    except Exception as error:  # whatever is wrong with a user's values, one line says it
        said = f"{type(error).__name__}: {' '.join(printable(str(error)).split())}"
        raise InputError(f"is no usable model configuration ({said})", source=source, field="model") from error


def _sections(document: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    for key, value in document.items() if isinstance(document, dict) else ():
        if key in ("rope_parameters", "rope_scaling") and isinstance(value, dict):
            by_layer = [one for one in value.values() if isinstance(one, dict)]
            yield from ((key, one) for one in by_layer or [value])
        elif isinstance(value, dict):
            yield from _sections(value)
