"""What a layout is: a frozen value that says which shards travel when, and builds the schedule of one direction.

A layout is one file: a dataclass derived from `Layout`, registered with `registry.register`. Plan files, the command
line, training configurations, the search and the property tests find it by that alone.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from ...traces.errors import InputError, UnsupportedError
from ..schedule.pairs import Pairs
from ..schedule.schedule import Direction, Schedule
from ..schedule.shape import AttentionShape

MAX_INNER_SIZES = 6
# On more of them layouts propose fewer candidates. On 8 nodes of 8 GPUs, groups across nodes, and head parallelism with
# keys in few chunks, took a quarter longer than the best of their layout, or more, on both traces that were planned.
VERY_MANY_RANKS = 128


@dataclass(frozen=True, kw_only=True)
class Offers:
    """What a cluster and a user offer to layouts, which propose candidates that make use of it.

    pulls: ranks may read each other's memory. rounds_parts: what one
    kernel adds to dK/dV of another rank may travel in the inputs' type; rounds_sums: so may sums of several ranks.
    columns: there may be some.
    named: the layouts that were asked for; empty: any.
    """

    nodes: int = 1
    gpus_per_node: int = 1
    pulls: bool = False
    rounds_parts: bool = False
    rounds_sums: bool = False
    columns: bool = True
    named: frozenset[str] = frozenset()

    @property
    def world_size(self) -> int:
        """Ranks: one for every GPU."""
        return self.nodes * self.gpus_per_node

    @property
    def very_many(self) -> bool:
        """Whether there are so many ranks that fewer candidates are looked at."""
        return self.world_size > VERY_MANY_RANKS

    def counts(self, *wanted: int) -> list[int]:
        """Return counts of things that there cannot be more of than a rank has peers, ascending."""
        return sorted({min(count, max(self.world_size - 1, 1)) for count in wanted})

    @property
    def inner_sizes(self) -> list[int]:
        """Sizes of groups that divide the ranks, neither 1 nor all of them; those nearest to a node first.

        Of very many ranks none that is larger than a node.
        """
        most = self.gpus_per_node if self.very_many else self.world_size - 1
        divisors = [size for size in range(2, most + 1) if self.world_size % size == 0]
        return sorted(divisors, key=lambda size: (abs(math.log2(size / self.gpus_per_node)), size))[:MAX_INNER_SIZES]


@dataclass(frozen=True, kw_only=True)
class Transfers:
    """How K/V and gradients travel, beyond being sent in full width. pull: copied by their destination.

    narrow: gradients in the inputs' type, rounded once.
    """

    pull: bool = False
    narrow: bool = False


@dataclass(frozen=True, kw_only=True, eq=False)
class Entering:
    """How many shards come from other nodes to each rank at least, int64 [W] each: K/V, and sums of their gradients."""

    kv: NDArray[np.int64]
    dkv: NDArray[np.int64]

    @classmethod
    def nothing(cls, world_size: int) -> Self:
        """Say nothing."""
        return cls(kv=np.zeros(world_size, dtype=np.int64), dkv=np.zeros(world_size, dtype=np.int64))


@dataclass(frozen=True, kw_only=True)
class Layout(ABC):
    """How shards travel and in which phases they are computed. Fields are of type bool, or int and at least 1.

    words: the layout as a noun phrase, for sentences. plainness: the search takes the lowest among equally quick ones.
    leaves_out: whether pairs without work are neither computed nor sent, as `build` is told them.
    Raises InputError, naming field and value, for a value of another type or below 1.
    """

    name: ClassVar[str]
    words: ClassVar[str]
    plainness: ClassVar[int] = 100
    leaves_out: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for field in fields(self):
            value, flag = getattr(self, field.name), field.type in (bool, "bool")
            if type(value) is not (bool if flag else int):
                wanted = "true or false" if flag else "a whole number"
                raise InputError(f"is {value!r}, not {wanted}", field=field.name)
            if not flag and value < 1:
                raise InputError(f"must be at least 1, not {value}", field=field.name)

    @abstractmethod
    def expand(self, shape: AttentionShape, direction: Direction, pairs: Pairs) -> Schedule:
        """Return the schedule of one direction; `build` calls this for shapes that the layout applies to."""

    def build(self, *, shape: AttentionShape, direction: Direction, pairs: Pairs | None = None) -> Schedule:
        """Return the schedule of one direction; UnsupportedError where the layout does not apply to the shape.

        pairs: the (query part, key part) pairs that may have work; None: all. A layout may leave out the others.
        """
        problem = self.why_not(shape)
        if problem is not None:
            raise UnsupportedError(problem, field=self.name)
        return self.expand(shape, direction, pairs or Pairs.all_of(shape.world_size))

    def why_not(self, shape: AttentionShape) -> str | None:
        """Return why the layout cannot be built for these sizes, in one line; None where it can."""
        return None

    @classmethod
    def candidates(cls, offers: Offers) -> Sequence[Self]:
        """Return the values that a search looks at on a cluster, the plainest first."""
        return []

    @classmethod
    def baselines(cls, offers: Offers) -> Sequence[tuple[str, Self]]:
        """Return what people use without a planner, as (name of the placement, value): every plan is compared to it."""
        return []

    @property
    def kept_slots(self) -> object | None:
        """What decides which slot keeps which K/V from forward to backward; None where nothing is kept.

        Two directions go together where this is equal.
        """
        return None

    @property
    def transfers(self) -> Transfers:
        """How K/V and gradients travel."""
        return Transfers()

    def played_as(self, direction: Direction) -> Layout:
        """Return the plainest layout that has the same schedule in a direction: a parameter may concern one alone."""
        return self

    def entering(self, pairs: Pairs, *, ranks_per_node: int) -> Entering:
        """Return what comes to ranks from other nodes, at least: so a search need not build what cannot be quick.

        By default nothing is said; where that is so, what no layout can do without is the bound all the same.
        """
        return Entering.nothing(pairs.world_size)

    @property
    def head_groups(self) -> int:
        """Over how many ranks the heads of a query shard are split: 1 where every rank computes all heads."""
        return 1

    @property
    def margin(self) -> float:
        """The share of a step's time that a plan must gain over others before it is picked with this layout."""
        return 0.0

    @property
    def parameters(self) -> dict[str, bool | int]:
        """All fields as plain values, as plan files state them."""
        return asdict(self)

    def __str__(self) -> str:
        given = [name if value is True else f"{name} {value}" for name, value in asdict(self).items() if value]
        return f"{self.name} ({', '.join(given)})" if given else self.name

    @property
    def text(self) -> str:
        """The layout as command lines write it, such as gather:chunks=2,pull; see `registry.parse_layout`."""
        given = [name if value is True else f"{name}={value}" for name, value in asdict(self).items() if value]
        return ":".join(filter(None, [self.name, ",".join(given)]))
