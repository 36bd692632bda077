"""Making the small copies that the audit runs: of every kind of layer for the proof, of all layers for a quick look."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedModel

from ...traces.errors import UnsupportedError
from .shrink import Shrinking, enliven, layers_to_keep, narrowest, shrunken_config
from .twins import Double

MOST_PARAMETERS = 60_000_000  # float64, three copies and their gradients stay within 4 GB


@dataclass(frozen=True, kw_only=True)
class SmallCopies:
    """How small copies of one model are made. narrow: widths that its class can make; keep: layers of every kind."""

    config: Any
    model_class: type[PreTrainedModel]
    narrow: Shrinking
    keep: int | None

    def scaled(self, *, window: float, positions: float) -> PreTrainedModel:
        """Return a copy with a layer of every kind, lengths multiplied; UnsupportedError when there is none."""
        few = replace(self.narrow, window=window, positions=positions)
        return self._first([replace(few, layers=self.keep), few])

    def at_true_lengths(self) -> Iterator[PreTrainedModel]:
        """Yield copies with the model's own lengths: of all layers where that is small enough, then of every kind."""
        whole = replace(self.narrow, layers=None)
        if self._parameters(whole) <= MOST_PARAMETERS:
            yield self._made(whole)
        yield self._first([replace(self.narrow, layers=self.keep), whole])

    def _first(self, candidates: list[Shrinking]) -> PreTrainedModel:
        """Return the first that can be made and is small enough to run."""
        problem = ""
        for candidate in candidates:
            try:
                parameters = self._parameters(candidate)
            except Exception as error:  # a class may not know how to have fewer layers, or other lengths
                problem = f"{type(error).__name__}: {error}"
                continue
            if parameters <= MOST_PARAMETERS:
                return self._made(candidate)
            problem = f"{parameters:,} parameters are too many"
        raise UnsupportedError(f"no small copy can be made ({problem})", field="audit")

    def _parameters(self, shrinking: Shrinking) -> int:
        with torch.device("meta"):
            return sum(p.numel() for p in make(shrunken_config(self.config, shrinking), self.model_class).parameters())

    def _made(self, shrinking: Shrinking) -> PreTrainedModel:
        config = shrunken_config(self.config, shrinking)
        config.use_cache = False
        with Double(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = make(config, self.model_class).double()
        enliven(model, seed=0)
        return model


def small_copies(config: Any, model_class: type[PreTrainedModel]) -> SmallCopies:
    """Find widths that a class can make, the narrowest first. UnsupportedError with the first problem if none."""
    narrow = narrowest(config)
    problem = ""
    for candidate in (narrow, replace(narrow, few=False), replace(narrow, few=False, width=1)):
        try:
            with torch.device("meta"):
                whole = make(shrunken_config(config, candidate), model_class)
        except Exception as error:  # whatever a class says about narrow settings, wider ones are tried
            problem = problem or f"{type(error).__name__}: {error}"
            continue
        return SmallCopies(config=config, model_class=model_class, narrow=candidate, keep=layers_to_keep(whole))
    raise UnsupportedError(f"no small copy can be made ({problem})", field="audit")


def make(config: Any, model_class: type[PreTrainedModel]) -> PreTrainedModel:
    """Return a model of a configuration with its own eager attention."""
    config._experts_implementation = "eager"  # grouped products of experts know no float64
    return model_class._from_config(config, attn_implementation="eager")
