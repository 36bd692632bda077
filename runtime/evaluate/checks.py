"""What settings, data and a model's configuration must have in common, found out before weights are loaded."""

from __future__ import annotations

from typing import Any

from ...kernels.select.registry import Selector
from ...traces.errors import InputError
from ..data.shards import TokenData
from ..data.writer import Tokenizer, byte_tokenizer
from ..model.shape import text_config
from .retrieval import require_room
from .settings import AGREEMENT, OF_SELECTOR, OF_TEXT, EvaluationSettings


def require_fit(
    config: Any, data: TokenData, selector: Selector | None, settings: EvaluationSettings, tokenizer: Tokenizer | None
) -> Tokenizer | None:
    """Return the tokenizer for what is planted, None where nothing is.

    config: a model's. InputError names the setting, or the data's folder.
    """
    for task in OF_SELECTOR if selector is None else ():
        if task in settings.tasks:
            raise InputError(f"{task!r} is about chosen patterns: give a selector", field="tasks")
    if AGREEMENT in settings.tasks and not settings.dense_too:
        raise InputError(f"{AGREEMENT!r} compares with dense attention, which is left out", field="tasks")
    if settings.documents.attention and selector is not None and not selector.keeps_documents:
        raise InputError(f"{selector.name!r} does not choose per document", field="documents.attention")
    vocabulary = text_config(config).vocab_size
    if data.manifest.vocabulary > vocabulary:
        raise InputError(f"has a vocabulary of {data.manifest.vocabulary}, the model of {vocabulary}",
                         source=data.folder, field="vocabulary")  # fmt: skip
    there = data.sequences(settings.seq_len_tokens)
    if any(task in OF_TEXT for task in settings.tasks) and settings.sequences > there:
        told = f"are {settings.sequences}; {data.folder} holds {there} of {settings.seq_len_tokens} tokens"
        raise InputError(told, field="sequences")
    if not settings.asks_questions:
        return None
    tokenizer = _tokenizer(data, tokenizer)
    require_room(settings, tokenizer)
    return tokenizer


def _tokenizer(data: TokenData, given: Tokenizer | None) -> Tokenizer:
    """Return the tokenizer of the data. InputError where it is not given, or has another vocabulary."""
    if given is None and data.manifest.tokenizer == "byte":
        given = byte_tokenizer()
    if given is None:
        told = f"of {data.manifest.tokenizer!r} is needed for what is planted in the text"
        raise InputError(told, field="tokenizer")
    if given.vocabulary != data.manifest.vocabulary:
        told = f"has {given.vocabulary} tokens, that of the data {data.manifest.vocabulary}"
        raise InputError(told, source=data.folder, field="tokenizer")
    return given
