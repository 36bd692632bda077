"""Shards, collectives between threads, and the worked cases, for tests of selectors."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np
import torch

from kernel_cases import GOLDEN
from sparsering.kernels.mask import AttentionMask
from sparsering.kernels.select.probe import Collectives, ShardTensors
from sparsering.kernels.select.sink_window import SinkWindow


def load(name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / f"choose-{name}.npz") as z:
        return {key: z[key] for key in z.files}


def shard_of(
    q: torch.Tensor,
    k: torch.Tensor,
    *,
    block_size: int,
    ranks: int = 1,
    rank: int = 0,
    granularity: int | None = None,
    seq_len: int | None = None,
    documents: torch.Tensor | None = None,
) -> ShardTensors:
    """One rank's share of q, k [S, H, D], striped by `granularity` tokens."""
    granularity = granularity or q.shape[0] // ranks
    at = torch.arange(q.shape[0])
    own = at[at // granularity % ranks == rank]
    return ShardTensors(
        q=q[None, own],
        k=k[None, own],
        positions=own,
        seq_len_tokens=seq_len or q.shape[0],
        block_size=block_size,
        granularity_tokens=granularity,
        documents=documents,
    )


def on_ranks(ranks: int, work: Callable[[int, Collectives], object]) -> list:
    """Run work(rank, collectives) on threads whose collectives really reduce over all of them."""
    barrier = threading.Barrier(ranks)
    posted: list = [None] * ranks
    results: list = [None] * ranks

    def reduce_with(rank: int, combine: Callable[[torch.Tensor], torch.Tensor]) -> Callable:
        def call(x: torch.Tensor) -> torch.Tensor:
            assert x.is_contiguous()
            posted[rank] = x
            barrier.wait()
            total = combine(torch.stack(posted)).to(x.dtype)
            barrier.wait()
            return total

        return call

    def run(rank: int) -> None:
        try:
            results[rank] = work(
                rank,
                Collectives(
                    all_reduce_sum=reduce_with(rank, lambda x: x.sum(0)),
                    all_reduce_max=reduce_with(rank, lambda x: x.amax(0)),
                ),
            )
        except BaseException as error:
            results[rank] = error
            barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        if isinstance(result, BaseException) and not isinstance(result, threading.BrokenBarrierError):
            raise result
    return results


def lists_of(mask: AttentionMask) -> tuple[list[list[int]], list[list[int]]]:
    """(columns, diagonals) of every head as lists."""
    assert mask.columns is not None
    return (
        [[c for c in row if c < mask.seq_len_tokens] for row in mask.columns.tolist()],
        [row.nonzero().flatten().tolist() for row in mask.active],
    )


def golden_lists(data: dict[str, np.ndarray], kind: str) -> tuple[list[list[int]], list[list[int]]]:
    def split(key: str) -> list[list[int]]:
        return [part.tolist() for part in np.split(data[key], data[f"{key}_offsets"][1:-1])]

    return split(f"{kind}_columns"), split(f"{kind}_diagonals")


def numpy_diagonals(distances: list[int], block: int, length: int) -> list[int]:
    both = {s // block for s in distances} | {-(-s // block) for s in distances} | {0}
    return sorted(d for d in both if d < -(-length // block))


def sink_window(shard: ShardTensors, *, sink_tokens: int, window_tokens: int) -> AttentionMask:
    return SinkWindow(sink_tokens=sink_tokens, window_tokens=window_tokens).choose(shard, scale=1.0)
