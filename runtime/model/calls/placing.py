"""Getting positions to where a model makes embeddings of them, in classes that take none or count them themselves.

A shard's tokens are not 0, 1, 2, …, so every call has `position_ids`. Classes that do not pass them on get them where
they are used: by the body below the head, or by its table of positions. Classes that give the first token another
number than 0, and count tokens that are no padding (RoBERTa's), get them with that number added.

Shape legend: B batch, S_own tokens of this rank's shard.
"""

from __future__ import annotations

import inspect
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import Embedding, Module

from ....traces.errors import UnsupportedError

POSITIONS = "position_ids"
COUNTING = "create_position_ids_from_input_ids"  # of transformers' embeddings whose positions depend on tokens


def arguments(module: Module, args: Any, keywords: dict[str, Any]) -> dict[str, Any]:
    """Return what a module's forward is called with, by name, however it was given."""
    return inspect.signature(module.forward).bind_partial(*args).arguments | keywords


def uncounted_token(body: Module) -> tuple[int | None, int]:
    """Return the token that a model leaves out when it counts tokens, and the position of the first other one.

    (None, 0) where all count.
    """
    for module in body.modules():
        if hasattr(module, COUNTING) and type(token := getattr(module, "padding_idx", None)) is int:
            return token, token + 1
    token = getattr(body, "pad_index", None)  # XLM's: how many others there are is the length of a sequence
    return (token, 0) if type(token) is int else (None, 0)


class Placing:
    """Hooks of one attached model that bring positions to where they are used. A deep copy of the model shares it."""

    def __init__(self, model: Module, body: Module) -> None:
        self.uncounted, self.first = uncounted_token(body)
        self._passes, self._takes = (_names_positions(module) for module in (model, body))
        self._waiting: Tensor | None = None
        self.current = torch.zeros(0, dtype=torch.int64)  # [B, S_own] of the call that runs
        self._row: Tensor | None = None
        self._tables = [] if self._takes else [m for m in body.modules() if _is_table(m)]

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Copies are called one after the other."""
        return self

    def before_model(self, module: Module, args: Any, keywords: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Keep positions from a class that would not pass them on."""
        self._waiting = None
        if self._passes or POSITIONS not in keywords:
            return args, keywords
        self._waiting = keywords[POSITIONS]
        return args, {name: value for name, value in keywords.items() if name != POSITIONS}

    def before_body(self, module: Module, args: Any, keywords: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Hand them to its body, where they are compared with the plan's."""
        waiting, self._waiting = self._waiting, None
        return args, keywords if waiting is None else keywords | {POSITIONS: waiting}

    def place(self, module: Module, args: Any, keywords: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Give the body's positions the form in which it takes them."""
        given: Tensor | None = keywords.get(POSITIONS)
        if given is None:
            return args, keywords
        self.current = given
        if self._takes:
            return args, keywords | {POSITIONS: given + self.first} if self.first else keywords
        if given.shape[0] > 1 and given.stride(0) != 0:
            raise UnsupportedError(f"differ between sequences; {type(module).__name__} has one row of them",
                                   field=POSITIONS)  # fmt: skip
        self._row = given[0]
        return args, {name: value for name, value in keywords.items() if name != POSITIONS}

    def hooks(self) -> list[Any]:
        """Give tables of positions this shard's."""
        return [table.register_forward_pre_hook(self._before_table, with_kwargs=True) for table in self._tables]

    def _before_table(self, module: Module, args: Any, keywords: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, keywords | {POSITIONS: self._row}

    def uncounted_in(self, given: dict[str, Any], seq_len_tokens: int) -> Tensor | None:
        """Return, as a bool scalar, whether a call has tokens that the model leaves out; None where it counts all."""
        ids, positions = given.get("input_ids"), given.get(POSITIONS)
        if self.uncounted is None or ids is None or positions is None:
            return None
        return ((ids == self.uncounted) & (positions < seq_len_tokens)).any()


def _names_positions(module: Module) -> bool:
    return POSITIONS in inspect.signature(module.forward).parameters


def _is_table(module: Module) -> bool:
    """Whether this is an embedding of positions, which classes derive from torch's to add an offset."""
    return isinstance(module, Embedding) and type(module) is not torch.nn.Embedding and _names_positions(module)
