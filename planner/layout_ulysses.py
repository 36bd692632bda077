"""Head parallelism, for simulation."""

from __future__ import annotations

from ..traces.errors import UnsupportedError
from .layout_draft import AttentionShape, Draft, close_schedule, slots
from .pairs import Pairs
from .schedule import (
    DKV_HOME,
    KV_HOME,
    OUT_HOME,
    Q_HOME,
    Buffer,
    Communicator,
    Direction,
    Schedule,
    ShardId,
    Task,
    Transfer,
    TransferKind,
)


def ulysses(*, shape: AttentionShape, direction: Direction, pairs: Pairs | None = None) -> Schedule:
    """Head parallelism by all-to-all (DeepSpeed-Ulysses, arXiv 2309.14509). Simulated only: `run` refuses it.

    Rank g gathers the whole sequence for head group g of W equal groups, computes it, and sends out (or dq, dk, dv)
    home. Each K/V head goes to every group whose query heads use it. Everything travels whatever `pairs` leaves out.
    """
    world = shape.world_size
    if shape.heads % world:
        raise UnsupportedError(f"{shape.heads} heads cannot be split over {world} ranks", field="ulysses")
    if shape.columns_capacity:
        raise UnsupportedError("columns are not gathered under head parallelism", field="ulysses")
    group_heads = shape.heads // world
    group_kv_heads = -(-group_heads * shape.kv_heads // shape.heads)
    q_bytes = shape.tokens_per_rank * group_heads * shape.head_dim * shape.element_bytes
    kv_bytes = 2 * shape.tokens_per_rank * group_kv_heads * shape.head_dim * shape.element_bytes
    sizes: dict[TransferKind, int] = {"q": q_bytes, "kv": kv_bytes, "out": q_bytes}
    if direction == "backward":  # q travels with dout, and its log-sum-exp and delta
        sizes["q"] = 2 * q_bytes + 8 * shape.tokens_per_rank * group_heads
        sizes["dkv"] = kv_bytes * shape.accumulator_bytes // shape.element_bytes
    buffers: list[Buffer] = [
        Buffer(name=Q_HOME, kind="q", capacity_bytes=world * sizes["q"]),
        Buffer(name=OUT_HOME, kind="out", capacity_bytes=world * sizes["out"]),
    ]
    for kind, size in sizes.items():
        buffers += slots(kind, kind, world, size)
        if kind in ("out", "dkv"):
            buffers += slots(f"{kind}_landing", kind, world, size)

    def move(kind: TransferKind, part: int, group: int, source: int, destination: int, source_buffer: str, buffer: str,
             into: str | None = None) -> Transfer:  # fmt: skip
        return Transfer(
            kind=kind,
            shard=ShardId(sequence_part=part, head_group=group),
            source=source,
            destination=destination,
            sequence=0,
            communicator="all_to_all",
            transport="p2p",
            source_buffer=source_buffer,
            buffer=buffer,
            capacity_bytes=sizes[kind],
            accumulate_into=into,
        )

    def draft(rank: int, parts: Draft) -> None:
        others = [(rank + offset) % world for offset in range(1, world)]
        fetch: list[Transfer] = []
        homeward: list[Transfer] = []
        for other in others:
            inputs: tuple[tuple[TransferKind, str], ...] = (("q", Q_HOME), ("kv", KV_HOME))
            results: tuple[tuple[TransferKind, str], ...] = (("out", OUT_HOME), ("dkv", DKV_HOME))
            for kind, home in inputs:
                fetch.append(move(kind, rank, other, rank, other, home, f"{kind}:{rank}"))
                fetch.append(move(kind, other, rank, other, rank, home, f"{kind}:{other}"))
            for kind, home in results:
                if kind in sizes:
                    landing = f"{kind}_landing:{rank}", f"{kind}_landing:{other}"
                    homeward.append(move(kind, other, rank, rank, other, f"{kind}:{other}", landing[0], home))
                    homeward.append(move(kind, rank, other, other, rank, f"{kind}:{rank}", landing[1], home))
        parts.launch(0, fetch, wait=1)
        parts.launch(2, homeward, wait=3)
        for query in range(world):
            for key in range(world):
                if pairs is None or pairs.needs(query, key):
                    parts.compute(1, task(rank, query, key))

    def task(rank: int, query: int, key: int) -> Task:
        own_query, own_key = query == rank, key == rank
        grad = None
        if direction == "backward":
            grad = DKV_HOME if own_key else f"dkv:{key}"
        return Task(
            query=ShardId(sequence_part=query, head_group=rank),
            key=ShardId(sequence_part=key, head_group=rank),
            heads=(rank * group_heads, (rank + 1) * group_heads),
            key_buffer=KV_HOME if own_key else f"kv:{key}",
            query_buffer=Q_HOME if own_query else f"q:{query}",
            out_buffer=OUT_HOME if own_query else f"out:{query}",
            grad_buffer=grad,
        )

    communicators = [Communicator(name="all_to_all", groups=(tuple(range(world)),))]
    return close_schedule("ulysses", direction, shape, communicators, buffers, draft)
