"""Lower bounds on the time of one layer, to say how far a plan is from the optimum.

No schedule can beat these in which every rank computes its own queries and sees every K/V shard that it needs, or, of
the degrees that are asked about, the queries of a group for its heads: neither the compute of the busiest rank, or
group, nor the time in which the bytes that must move cross the links of the busiest rank and node. Those of one layout
are for searches: it moves more than it must.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..layouts.layout import Layout
from ..schedule.batch import BatchWork, LaunchBatch
from ..schedule.launches import Launch, launches_of
from ..schedule.pairs import Pairs
from ..schedule.schedule import Direction, ShardId, Task
from ..schedule.shape import AttentionShape
from ..schedule.workload import TaskWork, Workload
from .cluster import Cluster
from .model import CostModel


@dataclass(frozen=True, kw_only=True)
class Allowed:
    """What schedules may do: the less there is, the higher the bounds.

    pairs: (query part, key part) pairs that are computed; None: all. keep_kv: backward may have kept forward's K/V.
    narrow_gradients: dK/dV may travel in the inputs' type. pulls: ranks may pull where the cluster can. degrees: sizes
    of groups of ranks that heads may be split over. ever_full_speed: compute may be as quick while data move, as the
    recurrence takes it to be.
    """

    pairs: Pairs | None = None
    keep_kv: bool = False
    narrow_gradients: bool = False
    pulls: bool = True
    degrees: tuple[int, ...] = ()
    ever_full_speed: bool = False

    def needed(self, shape: AttentionShape) -> NDArray[np.bool_]:
        """Return bool [query part, key part]: the pairs that are computed."""
        return (self.pairs or Pairs.all_of(shape.world_size)).matrix


ANYTHING = Allowed()


def lower_bound_us(
    workload: Workload,
    cluster: Cluster,
    cost: CostModel,
    shape: AttentionShape,
    direction: Direction,
    allowed: Allowed = ANYTHING,
) -> float:
    """Return the least microseconds of one direction of one layer. Tile pairs are those of `workload`'s placement.

    The largest of compute, communication, and compute that moving data slow: at best one hides the other. Of the ways
    to split heads the least.
    """
    entering_bytes = _entering_bytes(cluster, shape, direction, allowed)
    bounds_us = [
        max(
            compute_bound_us(workload, cost, direction, degree=1),
            communication_bound_us(cluster, shape, direction, allowed),
            slowed_bound_us(workload, cluster, cost, direction, entering_bytes, allowed),
        )
    ]
    for degree in allowed.degrees:
        _, entering_bytes = _exchanged_bytes(cluster, shape, direction, allowed, degree=degree)
        bound_us = max(
            compute_bound_us(workload, cost, direction, degree=degree),
            exchange_bound_us(cluster, shape, direction, allowed, degree=degree),
            slowed_bound_us(workload, cluster, cost, direction, entering_bytes, allowed),
        )
        bounds_us.append(bound_us)
    return min(bounds_us)


def compute_bound_us(workload: Workload, cost: CostModel, direction: Direction, *, degree: int | None = None) -> float:
    """Return the time of an even share of the busiest group's work, by groups of `degree` ranks; None: of all ranks.

    A rank computes the share as one task of keys and one of columns, with rows for all programs. It holds for cost
    models in which cutting a launch never makes it quicker. Of a group's ranks one has no less than an even share: of
    keys and columns together, so a launch of one tile pair of columns is given back, since the rank that has most need
    not be the one that has columns. A rank alone has what it has.

    Nor has one of them less than the mean of what its ranks' own queries take in whatever launches (`joined_us`): that
    knows their rows, and all keys whose gradients are written.
    """
    world, heads = workload.world_size, workload.active.shape[2]
    size = degree or world
    rows = -(-workload.tokens_per_rank // workload.block_size) * heads
    own = ShardId(sequence_part=0)
    block = Task(query=own, key=own, heads=(0, heads), key_buffer="")
    columns = Task(query=own, key=None, heads=(0, heads), key_buffer="", kind="columns")

    def tasks_us(pairs_of: dict[Task, int]) -> float:
        cut = launches_of([task for task, pairs in pairs_of.items() if pairs], backend=cost.backend)
        return sum(
            cost.launch_us(Launch(tasks=tasks), [share(pairs_of[task]) for task in tasks], direction) for tasks in cut
        )

    def share(pairs: int) -> TaskWork:
        return TaskWork(
            tile_pairs=pairs, rows_with_work=rows, longest_row=0, key_rows_with_work=world * rows, longest_key_row=0,
            rows=rows, mask=workload.mask,
        )  # fmt: skip

    of_blocks = workload.active.sum(axis=(1, 2)).reshape(-1, size).sum(axis=1) // size
    of_columns = workload.columns.sum(axis=1).reshape(-1, size).sum(axis=1) // size
    busiest = int(np.argmax(of_blocks + of_columns))  # any group's is a bound; this one's is about the largest
    block_pairs, column_pairs = int(of_blocks[busiest]), int(of_columns[busiest])
    given_back_us = tasks_us({columns: 1}) if size > 1 and block_pairs and column_pairs else 0.0
    even_us = tasks_us({columns: column_pairs, block: block_pairs}) - given_back_us
    return max(even_us, float(joined_us(workload, cost, direction).reshape(-1, size).mean(axis=1).max()))


def joined_us(workload: Workload, cost: CostModel, direction: Direction) -> NDArray[np.float64]:
    """Return what each rank's own queries take at least with all keys and columns that they have, float64 [W]."""
    batch = LaunchBatch.whole(workload)
    return cost.least_us(batch, BatchWork.under(workload, batch), direction)


def slowed_bound_us(
    workload: Workload, cluster: Cluster, cost: CostModel, direction: Direction, entering_bytes: float, allowed: Allowed
) -> float:
    """Return the time of the mean rank's compute, and what it loses while data of other nodes come in.

    entering_bytes: of the mean node. A rank computes a share less while data move to it. Where they move for M and it
    computes for C at full speed, it is busy for C and a share of M, or idle meanwhile, which is longer: so it takes
    C + share * M at least. Any byte that enters a rank from another node takes the time of a card by itself, so the
    ranks' M add up to no less than all entering bytes do; and no schedule ends before its mean rank has.
    """
    share = 0.0 if allowed.ever_full_speed else cluster.gpu.communication_slowdown
    if not share or cluster.inter_node is None:
        return 0.0
    moving_us = entering_bytes / (cluster.gpus_per_node * cluster.inter_node.bandwidth_bytes_per_us)
    return float(joined_us(workload, cost, direction).mean()) + share * moving_us


def layout_bound_us(
    cluster: Cluster, shape: AttentionShape, direction: Direction, layout: Layout, pairs: Pairs
) -> float:
    """Return the time in which what a layout moves crosses links: what splitting heads exchanges, or what enters nodes.

    That is what the layout itself says that comes from other nodes, by the busiest card.
    """
    if layout.head_groups > 1:
        moved = Allowed(pairs=pairs, keep_kv=layout.kept_slots is not None, narrow_gradients=layout.transfers.narrow)
        return exchange_bound_us(cluster, shape, direction, moved, degree=layout.head_groups)
    if cluster.inter_node is None or cluster.nodes == 1:
        return 0.0
    ranks = range(cluster.world_size)
    cards = [cluster.node_of(rank) * cluster.inter_node.nics_per_node + cluster.nic_of(rank) for rank in ranks]
    return float(np.bincount(cards, weights=entering_us(cluster, shape, direction, layout, pairs)).max())


def entering_us(
    cluster: Cluster, shape: AttentionShape, direction: Direction, layout: Layout, pairs: Pairs
) -> NDArray[np.float64]:
    """Return the time in which a card by itself brings each rank what a layout says comes from other nodes, [W]."""
    if cluster.inter_node is None or cluster.nodes == 1:
        return np.zeros(cluster.world_size)
    entering = layout.entering(pairs, ranks_per_node=cluster.gpus_per_node)
    sent = Allowed(keep_kv=layout.kept_slots is not None, narrow_gradients=layout.transfers.narrow)
    kv_bytes, dkv_bytes = _moved_bytes(shape, direction, sent)
    return (entering.kv * kv_bytes + entering.dkv * dkv_bytes) / cluster.inter_node.bandwidth_bytes_per_us


def communication_bound_us(
    cluster: Cluster, shape: AttentionShape, direction: Direction, allowed: Allowed = ANYTHING
) -> float:
    """Return the microseconds that K/V (and in backward dK/dV) need on the ports of a GPU or the cards of a node.

    Every rank receives the shards of others that it needs and, summed along the way at best, sends as many sums of
    gradients: both are what its own port carries one way, and the mean over ranks of both together is what comes in.
    So it is with nodes: of the shards that some of its ranks need, those of other nodes enter. Columns are left out.
    Where K/V are kept, backward moves none; narrow gradients are as small as K/V; pulls go at their rate within a node,
    where that is the larger.
    """
    kv_bytes, dkv_bytes = _moved_bytes(shape, direction, allowed)
    needed = allowed.needed(shape)
    foreign = needed.sum(axis=1) - 1  # shards of others that each rank needs
    port_bytes_per_us = cluster.intra_node.bandwidth_bytes_per_us
    if allowed.pulls and cluster.pulls:
        port_bytes_per_us = max(port_bytes_per_us, cluster.intra_node.pull_bandwidth_bytes_per_us or 0.0)

    def most_bytes(shards: NDArray[np.int64]) -> float:
        """What comes in at the mean, or goes one way at the busiest: the larger."""
        return max(float(shards.mean()) * (kv_bytes + dkv_bytes), float(shards.max()) * max(kv_bytes, dkv_bytes))

    return _slower_us(cluster, port_bytes_per_us, most_bytes(foreign), most_bytes(_entering(cluster, needed)))


def exchange_bound_us(
    cluster: Cluster, shape: AttentionShape, direction: Direction, allowed: Allowed = ANYTHING, *, degree: int
) -> float:
    """Return the time of what head parallelism over groups of `degree` ranks moves, as `communication_bound_us` does.

    Every rank receives the queries of its group and the K/V that these need, for its heads, and its results (and sums
    of gradients) from others. Into a node that holds whole groups go the K/V of other nodes, each head's once; into one
    that holds a part of a group, those of its heads, and the queries and results of the rest of the group. Where groups
    and nodes cut each other, nothing is said of nodes.
    """
    bytes_of = _exchanged_bytes(cluster, shape, direction, allowed, degree=degree)
    return _slower_us(cluster, cluster.intra_node.bandwidth_bytes_per_us, *bytes_of)


def _exchanged_bytes(
    cluster: Cluster, shape: AttentionShape, direction: Direction, allowed: Allowed, *, degree: int
) -> tuple[float, float]:
    """Return the bytes that come to the mean rank, and that enter the mean node, with heads split over groups."""
    sizes, needed, ranks = shape.group_bytes(direction, degree), allowed.needed(shape), cluster.gpus_per_node
    exchanged, of_keys = sizes["q"] + sizes["out"], sizes["kv"] + sizes.get("dkv", 0)
    by_group = needed.reshape(-1, degree, shape.world_size).any(axis=1)
    foreign = by_group.sum() * degree / shape.world_size - 1
    rank_bytes = float((degree - 1) * exchanged + foreign * of_keys)
    if max(ranks, degree) % min(ranks, degree):
        return rank_bytes, 0.0
    groups = min(ranks, degree)  # head groups that a node computes
    shared = max(1, degree // shape.kv_heads)  # head groups that may use one copy of their K/V
    node_bytes = float(_entering(cluster, needed).mean()) * of_keys * max(1, groups // shared)
    return rank_bytes, node_bytes + ranks * max(0, degree - ranks) * exchanged


def _entering_bytes(cluster: Cluster, shape: AttentionShape, direction: Direction, allowed: Allowed) -> float:
    """Return the bytes of K/V and gradients that enter the mean node."""
    return float(_entering(cluster, allowed.needed(shape)).mean()) * sum(_moved_bytes(shape, direction, allowed))


def _moved_bytes(shape: AttentionShape, direction: Direction, allowed: Allowed) -> tuple[int, int]:
    """Return the bytes of a shard's K/V and of its gradients that move in a direction."""
    if direction == "forward":
        return shape.kv_bytes, 0
    return 0 if allowed.keep_kv else shape.kv_bytes, shape.kv_bytes if allowed.narrow_gradients else shape.dkv_bytes


def _entering(cluster: Cluster, needed: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Return int64 [nodes]: shards of other nodes that ranks of a node need. needed: bool [query part, key part]."""
    by_node = needed.reshape(cluster.nodes, cluster.gpus_per_node, cluster.world_size).any(axis=1)
    return by_node.sum(axis=1) - cluster.gpus_per_node


def _slower_us(cluster: Cluster, port_bytes_per_us: float, rank_bytes: float, node_bytes: float) -> float:
    """Return the time in which a rank's bytes cross its ports, or a node's bytes its cards: the longer one."""
    if cluster.inter_node is None or cluster.nodes == 1:
        return float(rank_bytes / port_bytes_per_us)
    nics_bytes_per_us = cluster.inter_node.nics_per_node * cluster.inter_node.bandwidth_bytes_per_us
    both_bytes_per_us = port_bytes_per_us + cluster.inter_node.bandwidth_bytes_per_us
    return float(max(node_bytes / nics_bytes_per_us, rank_bytes / both_bytes_per_us))
