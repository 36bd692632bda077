"""What a search is given: what may be picked, the cluster, the attention, and layers of a trace to judge by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ...traces.errors import InputError, unknown_name
from ..cost.cluster import Cluster
from ..cost.kernels import ACCUMULATOR_BYTES
from ..cost.model import CostModel
from ..layouts.layout import VERY_MANY_RANKS, Offers
from ..layouts.registry import layout_names
from ..replay import Recorded
from ..schedule.backends import facts_of
from ..schedule.heads import HeadOrder, balanced_order
from ..schedule.pairs import Pairs, causal_pairs, pairs_of_blocks
from ..schedule.placement import REGULAR_PLACEMENTS, Placement
from ..schedule.shape import AttentionShape
from ..specs import ELEMENT_BYTES, AttentionSpec, DType, KernelSpec, SelectorSpec

DEFAULT_MEMORY_FRACTION = 0.5  # the rest is for weights, optimizer, activations of the other layers
PLACEMENTS = (*REGULAR_PLACEMENTS, "balanced")


@dataclass(frozen=True, kw_only=True)
class SearchSpace:
    """What a search may pick, and what it judges by.

    layouts, placements: names to restrict the pick to; empty: any. narrow_gradients: dK/dV of others may be rounded to
    16 bits, once, before they travel. pulls: ranks may pull where the cluster's file says how fast.
    memory_limit_bytes: for one layer's attention on one GPU; None: `memory_fraction` of the GPU's memory.
    steps, layers: those of the trace to evaluate on; None: up to four evenly spread layers of the last training step.
    pattern: "trace" for plans that replay the trace, "choose" for plans that choose patterns as it did.
    dtype: of q, k and v. kernels: those that the plan names.
    Raises InputError, naming field and value, for what there is not or cannot be.
    """

    layouts: tuple[str, ...] = ()
    placements: tuple[str, ...] = ()
    narrow_gradients: bool = False
    pulls: bool = True
    memory_limit_bytes: int | None = None
    memory_fraction: float = DEFAULT_MEMORY_FRACTION
    steps: tuple[int, ...] | None = None
    layers: tuple[int, ...] | None = None
    pattern: str = "trace"
    dtype: DType = "bfloat16"
    kernels: KernelSpec = field(default_factory=KernelSpec)

    def __post_init__(self) -> None:
        known = (("layout", self.layouts, layout_names()), ("placement", self.placements, PLACEMENTS))
        for about, names, all_of_them in known:
            for name in names:
                if name not in all_of_them:
                    raise unknown_name(name, all_of_them, field=about)
        if not 0.0 < self.memory_fraction <= 1.0:
            raise InputError(f"must be above 0 and at most 1, not {self.memory_fraction}", field="memory_fraction")
        if self.memory_limit_bytes is not None and self.memory_limit_bytes < 1:
            raise InputError(f"must be positive, not {self.memory_limit_bytes}", field="memory_limit_bytes")
        if self.narrow_gradients and ELEMENT_BYTES[self.dtype] >= ACCUMULATOR_BYTES:
            raise InputError(f"sums are kept in {self.dtype} as it is: nothing to round", field="narrow_gradients")

    @property
    def rounds_parts(self) -> bool:
        """Whether what one kernel adds to dK/dV may travel in 16 bits: in any case where it wrote no more."""
        return self.narrow_gradients or facts_of(self.kernels.backend).rounds_gradients

    def offers(self, cluster: Cluster, *, restricted: bool = True, columns: bool = True) -> Offers:
        """Return what layouts may make use of; restricted: whether those named alone are asked; columns: if any."""
        return Offers(
            nodes=cluster.nodes,
            gpus_per_node=cluster.gpus_per_node,
            pulls=self.pulls and cluster.pulls,
            rounds_parts=self.rounds_parts,
            rounds_sums=self.narrow_gradients,
            columns=columns,
            named=frozenset(self.layouts if restricted else ()),
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class TraceSummary:
    """What a whole trace says. block_load: float64 [N], work of each mask block as queries, over `loaded_layers`.

    head_load: by layer, float64 [H]: the work of each query head, mean over steps; see `heads.head_load`.
    listed: whether any head lists its active blocks one by one. windowed: whether any head has a sliding window.
    choices: by layer, how its heads were chosen, each way once.
    active_blocks: bool [N, N], what any head of any layer and step activates; None where that was not counted: for
    very long sequences, and where it would be most of what is causal.
    """

    columns_capacity: int
    block_load: NDArray[np.float64]
    loaded_layers: int
    recorded_layers: int
    active_blocks: NDArray[np.bool_] | None = None
    head_load: Mapping[int, NDArray[np.float64]] = field(default_factory=dict)
    listed: bool = False
    windowed: bool = False
    choices: Mapping[int, tuple[SelectorSpec, ...]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, eq=False)
class Problem:
    """All that a search is given. cost: times of launches. samples: the layers that candidates are evaluated on."""

    space: SearchSpace
    cluster: Cluster
    cost: CostModel
    attention: AttentionSpec
    samples: tuple[Recorded, ...]
    summary: TraceSummary

    def offers(self, *, restricted: bool = True) -> Offers:
        """Return what layouts may make use of; restricted: whether those named alone are asked."""
        return self.space.offers(self.cluster, restricted=restricted, columns=self.attention.columns_capacity > 0)

    @property
    def backend(self) -> str:
        """The kernels that will run, by name."""
        return self.space.kernels.backend

    @property
    def memory_limit_bytes(self) -> int:
        """Bytes for one layer's attention on one GPU."""
        share_bytes = int(self.space.memory_fraction * self.cluster.gpu.memory_bytes)
        return share_bytes if self.space.memory_limit_bytes is None else self.space.memory_limit_bytes

    def pairs(self, placement: Placement) -> Pairs:
        """Return the pairs that can have work: in any recorded layer, or in any causal pattern where they are chosen.

        Without a count of what the layers activate together, what is causal has to do. On very many ranks every node
        has the pairs that any node has, counted from its own place: then ranks of different nodes are alike, and a
        schedule of hundreds of them is timed as one node's. Pairs of parts that follow each other around the ranks, of
        windows or documents, hardly become more; causal halves become whole.
        """
        active = self.summary.active_blocks
        if self.space.pattern != "trace" or active is None:
            found = causal_pairs(placement)
        else:
            found = pairs_of_blocks(active, placement, block_size=self.attention.block_size)
        return found.closed(self.cluster.gpus_per_node) if self.cluster.world_size > VERY_MANY_RANKS else found

    def shape(self, placement: Placement) -> AttentionShape:
        """Return the sizes of transfers under a placement."""
        return self.attention.shape_of(world_size=placement.world_size, tokens_per_rank=placement.tokens_per_rank)

    def head_order(self, layer: int, degree: int) -> HeadOrder:
        """Return the order in which a layer's heads are dealt out to groups; as they are where nothing is known."""
        load, model = self.summary.head_load.get(layer), self.attention.model
        if load is None:
            return tuple(range(model.heads))
        return balanced_order(load, kv_heads=model.kv_heads, degree=degree)

    def head_orders(self, degree: int) -> tuple[HeadOrder, ...] | None:
        """Return the order of every layer's heads, dealt out to `degree` groups; None where all stay as they are."""
        if degree == 1:
            return None
        natural = tuple(range(self.attention.model.heads))
        orders = tuple(self.head_order(layer, degree) for layer in range(self.attention.model.layers))
        return None if all(order == natural for order in orders) else orders
