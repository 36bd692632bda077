"""What a configuration says in plain words that planned attention does not do, before anything is built.

The audit's numbers would find these too; a name and a value from the configuration say it better.
"""

from __future__ import annotations

import re
from typing import Any

from ...traces.errors import UnsupportedError
from ..model.calls.asked import KEYS_OF_A_QUERY
from ..model.shape import LOCAL_KINDS, WINDOW, setting, text_config

PER_LENGTH_ROPE = ("dynamic", "longrope")  # they look at the longest position, which every rank sees differently
DROPOUT = re.compile(r"(dropout|pdrop|layerdrop|jitter|drop_path|stochastic_depth)")
NO_DROPOUT = re.compile(r"^(classifier|summary|seq_classif|label_)")
# Windows of other names than the one that `model/shape.py` knows: what they leave of a sequence is not known.
WINDOWS = ("sliding_window_size", "attention_window_size", "window_size", "local_attention")


def refuse_by_configuration(config: Any, *, seq_len_tokens: int) -> None:
    """Raise UnsupportedError, naming the setting and its value, for what would be computed wrongly over shards."""
    text = text_config(config)
    for name, value in sorted(text.to_dict().items()):
        if DROPOUT.search(name) and not NO_DROPOUT.search(name) and isinstance(value, int | float) and value > 0:
            raise UnsupportedError(f"is {value}; dropout and noise are not supported: set it to 0", field=name)
    positions = setting(text, "max_position_embeddings")
    is_static = type(positions) is int and seq_len_tokens <= positions  # `dynamic` begins to change beyond them
    _refuse_rope(setting(text, "rope_parameters"), "rope_parameters", is_static=is_static)
    for name in KEYS_OF_A_QUERY:
        keys = setting(text, name)
        if type(keys) is int and keys < seq_len_tokens:
            told = f"is {keys}, below the {seq_len_tokens} tokens of a sequence: the model chooses keys itself"
            raise UnsupportedError(told, field=name)
    kinds = set(setting(text, "layer_types") or ())
    if setting(text, "use_sliding_window") is not False and (not kinds or any("sliding" in kind for kind in kinds)):
        for name in () if type(setting(text, WINDOW)) is int or setting(text, LOCAL_KINDS) else WINDOWS:
            window = setting(text, name)
            if type(window) is int and 0 < window < seq_len_tokens:
                raise UnsupportedError(f"is {window}, below the {seq_len_tokens} tokens of a sequence", field=name)


def _refuse_rope(value: Any, field: str, *, is_static: bool) -> None:
    """Look into rotation settings, which may be nested by kind of layer."""
    if not isinstance(value, dict):
        return
    kind = value.get("rope_type")
    if kind in PER_LENGTH_ROPE and not (kind == "dynamic" and is_static):
        raise UnsupportedError(f"{kind!r} depends on the length a rank sees", field=f"{field}.rope_type")
    for name, inner in value.items():
        _refuse_rope(inner, f"{field}.{name}", is_static=is_static)
