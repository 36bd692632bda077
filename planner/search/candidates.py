"""What the search looks at: every placement and layout that makes sense for a length and a cluster, and plain ones.

A *plain* layout is what people use without a planner (contiguous, zigzag or striped ring, striping with an all-gather,
a striped hierarchical ring); each plan is compared with all of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ...traces.errors import InputError
from ..cost.cluster import Cluster
from ..layouts.registry import LAYOUTS
from ..schedule.placement import REGULAR_PLACEMENTS, Placement, balanced

GRANULARITY_BLOCKS = (1, 2, 4, 8)
RING_PREFETCH = (1, 2, 3)
GATHER_CHUNKS = (1, 2, 4)
FEW_CHUNKS = (1, 2)
TRANSFER_PARAMETERS = frozenset({"pull", "narrow_grads"})
MAX_INNER_SIZES = 6
MAX_TWO_LEVEL_SIZES = 2
# Coarser units than a block may pad the sequence, but by no more than this.
MAX_PADDING = 1.125
# Counting the tile pairs of token striping is quadratic in the sequence's blocks, whatever the density.
MAX_TOKEN_STRIPING_TOKENS = 128 * 1024
ROUNDING_BACKENDS = frozenset({"flash4"})  # whose kernels write dK/dV in the type of q, k and v
WHOLE_BLOCK_BACKENDS = frozenset({"triton", "flash4", "fastest"})
PLACEMENTS = (*REGULAR_PLACEMENTS, "balanced")


@dataclass(frozen=True, kw_only=True, order=True)
class PlacementChoice:
    """A placement by name and unit."""

    name: str
    granularity_tokens: int

    @property
    def regular(self) -> bool:
        """Whether neighbours among a rank's blocks are at one distance, all along or nearly so."""
        return self.name != "balanced"

    def __str__(self) -> str:
        return f"{self.name} ({self.granularity_tokens} tokens)"

    def build(
        self, *, seq_len_tokens: int, world_size: int, block_size: int, block_load: NDArray[np.float64]
    ) -> Placement:
        """Return the placement. block_load: work of each mask block as queries; only "balanced" looks at it."""
        sizes = {"seq_len_tokens": seq_len_tokens, "world_size": world_size}
        if self.name != "balanced":
            return REGULAR_PLACEMENTS[self.name](granularity_tokens=self.granularity_tokens, **sizes)
        blocks_per_unit = self.granularity_tokens // block_size
        assert blocks_per_unit * block_size == self.granularity_tokens, "balanced units are whole blocks"
        load = np.add.reduceat(block_load, np.arange(0, block_load.size, blocks_per_unit))
        return balanced(granularity_tokens=self.granularity_tokens, unit_load=load, **sizes)


@dataclass(frozen=True, kw_only=True, order=True)
class LayoutChoice:
    """A layout by name and its parameters, sorted."""

    layout: str
    parameters: tuple[tuple[str, int], ...]

    @property
    def keeps_kv(self) -> bool:
        """Whether forward keeps K/V for backward: then both directions must, in the same slots."""
        return self.kept_slots is not None

    @property
    def kept_slots(self) -> tuple[object, ...] | None:
        """What decides which slot keeps which shard; None where nothing is kept."""
        if self.layout == "two_level":
            return self.layout, *(one for one in self.parameters if one[0] in ("inner_size", "chunks"))
        return (self.layout,) if ("keep_kv", 1) in self.parameters else None

    @property
    def transfers(self) -> tuple[tuple[str, int], ...]:
        """How K/V and gradients travel, among layouts that are otherwise the same."""
        return tuple(one for one in self.parameters if one[0] in TRANSFER_PARAMETERS)

    @property
    def splits_heads(self) -> bool:
        """Whether queries change ranks, so that every rank has a part of the heads."""
        return self.degree > 1

    @property
    def degree(self) -> int:
        """In how many groups the heads are split."""
        return dict(self.parameters).get("degree", 1)

    def __str__(self) -> str:
        shown = ", ".join(f"{name} {value}" for name, value in self.parameters)
        return f"{self.layout} ({shown})" if shown else self.layout


@dataclass(frozen=True, kw_only=True, order=True)
class Baseline:
    """A plain layout, the same in both directions. all_gather: whether it is block striping with an all-gather."""

    placement: PlacementChoice
    layout: LayoutChoice

    @property
    def all_gather(self) -> bool:
        """Whether this is block striping with an all-gather."""
        return self.placement.name == "striped" and self.layout.layout == "gather"

    def __str__(self) -> str:
        return f"{self.placement}, {self.layout}"


def _layout(name: str, **parameters: int) -> LayoutChoice:
    return LayoutChoice(layout=name, parameters=tuple(sorted(parameters.items())))


KEEPING = _layout("gather", chunks=1, keep_kv=1)


def placement_choices(
    *, seq_len_tokens: int, world_size: int, block_size: int, names: Sequence[str] | None = None
) -> list[PlacementChoice]:
    """Return the placements worth a look, the plainest first; InputError for an unknown name in `names`."""
    _known(names, PLACEMENTS, "placement")
    choices = [
        PlacementChoice(name=name, granularity_tokens=block_size) for name in ("striped", "zigzag", "contiguous")
    ]
    for blocks in GRANULARITY_BLOCKS:
        granularity = blocks * block_size
        padded = -(-seq_len_tokens // (world_size * granularity)) * world_size * granularity
        if blocks == 1 or padded <= MAX_PADDING * seq_len_tokens:
            choices += [PlacementChoice(name=name, granularity_tokens=granularity) for name in ("striped", "balanced")]
    choices.append(PlacementChoice(name="striped", granularity_tokens=1))
    return [choice for choice in dict.fromkeys(choices) if names is None or choice.name in names]


def layout_choices(
    *,
    cluster: Cluster,
    names: Sequence[str] | None = None,
    narrow_gradients: bool = False,
    narrow_parts: bool = False,
    pulls: bool = True,
) -> list[LayoutChoice]:
    """Return the layouts worth a look on the cluster, the plainest first; InputError for an unknown name in `names`.

    narrow_gradients: whether dK/dV may travel in 16 bits; narrow_parts: only those that one kernel wrote, and no sums.
    pulls: whether ranks may pull where the cluster's file says how fast. Both with FEW_CHUNKS alone, since more chunks
    are more launches, and hid nothing more where they were measured (docs/ring.md).
    """
    _known(names, tuple(LAYOUTS), "layout")
    peers = max(cluster.world_size - 1, 1)
    chunks = sorted({min(count, peers) for count in (*GATHER_CHUNKS, peers)})
    choices = [_layout("gather", chunks=count) for count in chunks]
    choices += [_layout("ring", prefetch=depth) for depth in sorted({min(depth, peers) for depth in RING_PREFETCH})]
    choices += [_layout("hierarchical", inner_size=size) for size in inner_sizes(cluster)]
    if cluster.nodes > 1 or "two_level" in (names or ()):
        narrow = {"narrow_grads": 1} if narrow_gradients else {}
        sizes = inner_sizes(cluster)[:MAX_TWO_LEVEL_SIZES]
        choices += [
            _layout("two_level", inner_size=size, **halves, **narrow)
            for halves in ({}, {"halves": 1})
            for size in sizes
        ]
        if shares_cards(cluster):  # in turns they fill them too, and what has crossed is computed meanwhile
            choices += [_layout("two_level", inner_size=size, chunks=2, **narrow) for size in sizes if size % 2 == 0]
    choices += [_layout("collective"), _layout("collective", chunks=2)]
    choices += [_layout("gather", chunks=count, keep_kv=1) for count in chunks]
    for transport in _transports(cluster, narrow=narrow_gradients or narrow_parts, pulls=pulls):
        few = [count for count in chunks if count in FEW_CHUNKS]
        choices += [
            _layout("gather", chunks=count, **kept, **transport) for kept in ({}, {"keep_kv": 1}) for count in few
        ]
    pieces: list[int] = sorted({min(count, peers) for count in (1, 2, cluster.nodes)})
    choices += [_layout("ulysses", degree=degree, chunks=count) for degree in head_degrees(cluster) for count in pieces]
    return [choice for choice in choices if names is None or choice.layout in names]


def _transports(cluster: Cluster, *, narrow: bool, pulls: bool) -> list[dict[str, int]]:
    """Return what a `gather` may do beyond sending in full width, as parameters: rounded gradients, pulls, both."""
    rounded = [{"narrow_grads": 1}] if narrow else []
    pulled = [{"pull": 1} | one for one in ({}, *rounded)] if pulls and cluster.pulls else []
    return rounded + pulled


def shares_cards(cluster: Cluster) -> bool:
    """Whether GPUs of a node share its network cards."""
    return cluster.inter_node is not None and cluster.inter_node.nics_per_node < cluster.gpus_per_node


def head_degrees(cluster: Cluster) -> list[int]:
    """Return sizes of the groups that heads may be split over: those that divide a node, and all ranks."""
    divisors = [size for size in range(2, cluster.gpus_per_node + 1) if cluster.gpus_per_node % size == 0]
    return [*divisors, *([cluster.world_size] if cluster.nodes > 1 else [])]


def inner_sizes(cluster: Cluster) -> list[int]:
    """Return sizes of the inner ring: proper divisors of the world, those nearest to a node first."""
    world = cluster.world_size
    divisors = [size for size in range(2, world) if world % size == 0]
    return sorted(divisors, key=lambda size: (abs(math.log2(size / cluster.gpus_per_node)), size))[:MAX_INNER_SIZES]


def baselines(*, cluster: Cluster, block_size: int) -> list[Baseline]:
    """Return the plain layouts of the cluster, block striping with an all-gather first."""
    striped, zigzag, contiguous = (
        PlacementChoice(name=name, granularity_tokens=block_size) for name in ("striped", "zigzag", "contiguous")
    )
    gathers = [
        layout for layout in layout_choices(cluster=cluster, names=["gather"], pulls=False) if not layout.keeps_kv
    ]
    found = [Baseline(placement=striped, layout=layout) for layout in gathers]
    ring = _layout("ring", prefetch=1)
    found += [Baseline(placement=placement, layout=ring) for placement in (striped, zigzag, contiguous)]
    if cluster.gpus_per_node in inner_sizes(cluster):
        found.append(Baseline(placement=striped, layout=_layout("hierarchical", inner_size=cluster.gpus_per_node)))
    return found


def why_not_executable(placement: PlacementChoice, *, backend: str, block_size: int) -> str | None:
    """Return why the backend cannot execute this, in a few words; None when it can."""
    if backend in WHOLE_BLOCK_BACKENDS and placement.granularity_tokens % block_size:
        return f"{backend} needs whole blocks"
    return None


def _known(names: Sequence[str] | None, known: Sequence[str], field: str) -> None:
    for name in names or ():
        if name not in known:
            raise InputError(f"{name!r} is not one of {', '.join(known)}", field=field)
