"""Making the small copies that the audit runs: of every kind of layer for the proof, of all layers for a quick look."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedModel

from ...traces.errors import UnsupportedError
from .shrink import PADDED_TOKENS, Shrinking, enliven, layers_to_keep, narrowest, shrunken_config
from .twins import Double

AUDITED_TOKENS = 120  # 7.5 stripes of 16 tokens: the last one is padded to PADDED_TOKENS
MOST_PARAMETERS = 60_000_000  # float64, three copies and their gradients stay within 4 GB


class SmallCopies:
    """How small copies of one model are made: of widths that its class can make, the narrowest first."""

    def __init__(self, config: Any, model_class: type[PreTrainedModel]) -> None:
        """Raises UnsupportedError with the first problem when no width can be made."""
        self.config, self.model_class = config, model_class
        narrow = narrowest(config)
        problem = ""
        for self.narrow in (narrow, replace(narrow, few=False), replace(narrow, few=False, width=1)):
            try:
                whole = self._on_meta(self.narrow)
            except Exception as error:  # whatever a class says about narrow settings, wider ones are tried
                problem = problem or f"{type(error).__name__}: {error}"
                continue
            self.keep = layers_to_keep(whole)
            return
        raise UnsupportedError(f"no small copy can be made ({problem})", field="audit")

    def scaled(self, seq_len_tokens: int) -> PreTrainedModel:
        """Return a copy with a layer of every kind, lengths as if AUDITED_TOKENS were seq_len_tokens.

        UnsupportedError when there is none.
        """
        few = replace(
            self.narrow,
            window=AUDITED_TOKENS / seq_len_tokens,
            within=AUDITED_TOKENS,
            positions=PADDED_TOKENS / seq_len_tokens,
        )
        return self._first([replace(few, layers=self.keep), few])

    def at_true_lengths(self) -> Iterator[PreTrainedModel]:
        """Yield copies with the model's own lengths: of all layers where that is small enough, then of every kind."""
        if self._on_meta(self.narrow).num_parameters() <= MOST_PARAMETERS:
            yield self._made(self.narrow)
        yield self._first([replace(self.narrow, layers=self.keep), self.narrow])

    def _first(self, candidates: list[Shrinking]) -> PreTrainedModel:
        """Return the first that can be made and is small enough to run."""
        problem = ""
        for candidate in candidates:
            try:
                parameters = self._on_meta(candidate).num_parameters()
            except Exception as error:  # a class may not know how to have fewer layers, or other lengths
                problem = f"{type(error).__name__}: {error}"
                continue
            if parameters <= MOST_PARAMETERS:
                return self._made(candidate)
            problem = f"{parameters:,} parameters are too many"
        raise UnsupportedError(f"no small copy can be made ({problem})", field="audit")

    def _on_meta(self, shrinking: Shrinking) -> PreTrainedModel:
        with torch.device("meta"):
            return make(shrunken_config(self.config, shrinking), self.model_class)

    def _made(self, shrinking: Shrinking) -> PreTrainedModel:
        config = shrunken_config(self.config, shrinking)
        config.use_cache = False
        with Double(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = make(config, self.model_class).double()
        enliven(model)
        return model


def make(config: Any, model_class: type[PreTrainedModel]) -> PreTrainedModel:
    """Return a model of a configuration with its own eager attention."""
    config._experts_implementation = "eager"  # grouped products of experts know no float64
    return model_class._from_config(config, attn_implementation="eager")
