"""Selectors as values: what every one is made of, and all of them by name.

A selector is a frozen dataclass whose fields are its settings, in a file of its own that registers it:

    @register
    @dataclass(frozen=True, kw_only=True)
    class Strided(Selector):
        name, causal, help = "strided", True, "every so many blocks"
        stride: int = count(4, "distance of the blocks, in blocks")

        def _choose(self, shard, *, scale, layer, collectives): ...

Capture, plans, training configurations and traces know a selector by `name` and `settings`, which are plain numbers.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from pkgutil import iter_modules
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from ..mask import AttentionMask
from .probe import ALONE, Collectives, ShardTensors

_KNOWN: dict[str, type[Selector]] = {}
S = TypeVar("S", bound="Selector")


@dataclass(frozen=True, kw_only=True)
class Selector(ABC):
    """How a layer's patterns are chosen. Making one raises ValueError, which names the setting and its value.

    name, help:      as plans, traces and the command line call it; what it keeps, in a few words
    causal:          no row's mask depends on tokens after the row's own block: what a model learns, it can use when it
                     generates
    keeps_documents: packed documents may be laid over its masks
    listed:          its masks list active blocks one by one, rather than as diagonals
    lists_documents: they do where documents are packed
    recordable:      without documents, a choice is the same launches whatever tensors say: a CUDA graph may replay it
    """

    name: ClassVar[str]
    help: ClassVar[str]
    causal: ClassVar[bool]
    keeps_documents: ClassVar[bool] = False
    listed: ClassVar[bool] = False
    lists_documents: ClassVar[bool] = False
    recordable: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for one in _settings(type(self)):
            least, value = one.metadata["least"], getattr(self, one.name)
            if least is None and (type(value) not in (int, float) or not 0 < value <= 1):
                raise ValueError(f"{one.name}: must be above 0 and at most 1, not {value!r}")
            if least is not None and (type(value) is not int or value < least):
                raise ValueError(f"{one.name}: must be a whole number from {least}, not {value!r}")

    @property
    def settings(self) -> dict[str, int | float]:
        """All settings by name, as traces and plans record them."""
        return {one.name: getattr(self, one.name) for one in _settings(type(self))}

    @property
    def most_columns(self) -> int:
        """How many token columns a head may get at most: the capacity that a plan needs."""
        return 0

    def most_columns_of(
        self, first: NDArray[np.int64], tokens: NDArray[np.int64], block_size: int
    ) -> NDArray[np.int64]:
        """Return how many columns a head may get at most of packed documents: their first tokens, and how many."""
        return np.zeros_like(tokens)

    def most_tokens_anywhere(self, block_size: int) -> int | None:
        """Return up to how many tokens a packed document need not begin with a block; None: any may begin anywhere."""
        return None

    def of_layer(self, layer: int) -> Selector:
        """Return the selector that one layer's masks are chosen by: this one, unless layers differ."""
        return self

    def of_head(self, layer: int, head: int) -> Selector:
        """Return the selector that one head's row of a trace names: this one, unless heads differ."""
        return self

    def choose(
        self, shard: ShardTensors, *, scale: float, layer: int = 0, collectives: Collectives = ALONE
    ) -> AttentionMask:
        """Return one layer's mask from this rank's queries and keys; collective, and the same on every rank.

        scale: the one that attention is called with. No gradient flows through a choice, and nothing waits for the
        device. Raises ValueError where settings and shard do not fit, and with packed documents unless it keeps them.
        """
        if shard.documents is not None and not self.keeps_documents:
            raise ValueError(f"documents: {self.name} is not chosen per document yet")
        with torch.no_grad():
            return self._choose(shard, scale=scale, layer=layer, collectives=collectives)

    @abstractmethod
    def _choose(self, shard: ShardTensors, *, scale: float, layer: int, collectives: Collectives) -> AttentionMask:
        """Choose; every block of a query's own must be active (`ShardTensors.chosen`)."""


def count(default: int, about: str, *, option: str | None = None, least: int = 1) -> Any:
    """Return a setting that is a whole number; option: how the command line spells it, by default as it is named."""
    return field(default=default, metadata={"about": about, "option": option, "least": least})


def share(default: float, about: str, *, option: str | None = None) -> Any:
    """Return a setting above 0 and at most 1."""
    return field(default=default, metadata={"about": about, "option": option, "least": None})


def option_of(setting: Field[Any]) -> str:
    """Return how the command line spells a setting."""
    return setting.metadata["option"] or "--" + setting.name.replace("_", "-")


def register(kind: type[S]) -> type[S]:
    """Make a class of selectors known by its name. ValueError when another has that name."""
    if _KNOWN.setdefault(kind.name, kind) is not kind:
        raise ValueError(f"selector {kind.name!r}: is {_KNOWN[kind.name].__qualname__} already")
    return kind


def selectors() -> dict[str, type[Selector]]:
    """Return all registered selectors by name, sorted: those of this folder and below, and those imported otherwise."""
    for name in _modules(Path(__file__).parent, ""):
        if not name.endswith("_triton"):  # kernels, which not every machine can import
            importlib.import_module(name, __package__)
    return dict(sorted(_KNOWN.items()))


def selector_of(name: str, settings: Mapping[str, Any]) -> Selector:
    """Return the selector that a plan or a trace names. ValueError for a name, setting or value that it cannot have."""
    known = selectors()
    if name not in known:
        raise ValueError(f"selector: {name!r} is not one of {', '.join(known)}")
    names = [one.name for one in fields(known[name])]
    for setting in settings:
        if setting not in names:
            raise ValueError(f"{setting}: {name} has no such setting; it has {', '.join(names)}")
    return known[name](**settings)


def _modules(folder: Path, package: str) -> Iterator[str]:
    """All modules of a folder and of those below it, relative to this package."""
    for found in iter_modules([str(folder)]):
        name = f"{package}.{found.name}"
        yield from _modules(folder / found.name, name) if found.ispkg else (name,)


def _settings(kind: type[Selector]) -> list[Field[Any]]:
    """The fields that `count` and `share` made."""
    return [one for one in fields(kind) if "least" in one.metadata]
