"""A model's config.json, which may come from anywhere: read through the gate of untrusted files, then by transformers.

transformers takes the file at its word: a vocabulary of 10^12 is allocated, a text where a number is meant fails deep
inside, or later. So the text is bounded first, then what sizes it states; what transformers raises becomes one line.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from ...traces.errors import MAX_SHOWN_CHARACTERS, InputError, printable, shortened, shown
from ...traces.files import read_json
from .rope import check_rope

MAX_CONFIG_BYTES = 16 << 20  # some list a name for each of 100,000 classes
MAX_CONFIG_VALUES = 1 << 20
MAX_TOLD_CHARACTERS = 4 * MAX_SHOWN_CHARACTERS
# The most that is believed of a size, by its name; of names that are not here, by what they end in.
MOST = {
    "vocab_size": 1 << 24, "hidden_size": 1 << 17, "intermediate_size": 1 << 20, "num_hidden_layers": 1 << 12,
    "num_attention_heads": 1 << 12, "num_key_value_heads": 1 << 12, "head_dim": 1 << 12,
    "max_position_embeddings": 1 << 30,
}  # fmt: skip
MOST_BY_ENDING = {"_layers": 1 << 12, "_heads": 1 << 12, "_experts": 1 << 16, "_dim": 1 << 20, "_size": 1 << 30,
                  "_rank": 1 << 20}  # fmt: skip


def read_config_file(source: Path) -> Any:
    """Return the transformers configuration of a config.json. InputError, in one line, names the file and the field."""
    document = read_json(source, max_bytes=MAX_CONFIG_BYTES, max_values=MAX_CONFIG_VALUES)
    if not isinstance(document, dict):
        raise InputError(f"is no model configuration: a mapping of keys is expected, not {shown(document)}",
                         source=source)  # fmt: skip
    _check_sizes(document, source)
    check_rope(document, source=source)
    try:
        config = AutoConfig.from_pretrained(source, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever is wrong with a user's file, one line says it
        raise InputError(f"is no model configuration ({told(error)})", source=source) from error
    return config


def told(error: BaseException) -> str:
    """Return an error of another library in a few words: its class, and the first line of what it says."""
    lines = printable(str(error)).strip().splitlines()
    lines = [line for line in lines if line.strip()][:2]
    return shortened(f"{type(error).__name__}: {' '.join(' '.join(lines).split())}", MAX_TOLD_CHARACTERS)


def _check_sizes(document: dict[str, Any], source: Path) -> None:
    for name, value in _entries(document):
        if not isinstance(value, list):
            _check_size(name, value, source)
            continue
        for one in value:  # of each layer in turn
            _check_size(name, one, source)


def _check_size(name: str, value: Any, source: Path) -> None:
    most = MOST.get(name) or next((most for end, most in MOST_BY_ENDING.items() if name.endswith(end)), None)
    if most is None or value is None:
        return
    if type(value) in (int, float) and not 0 <= value <= most:
        raise InputError(f"must be from 0 to {most}, not {shown(value)}", source=source, field=name)
    if name in MOST and type(value) is not int:
        raise InputError(f"must be a whole number, not {shown(value)}", source=source, field=name)


def _entries(document: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield all names and values, also of the parts that a larger model's configuration has."""
    for name, value in document.items():
        if isinstance(value, dict):
            yield from _entries(value)
        else:
            yield name, value
