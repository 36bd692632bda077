"""What launches of the Triton kernels share: sources for tile loads, views, checks of tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..head_dims import HEAD_DIMS
from ..index.block import BlockTask
from ..index.columns import ColumnTask
from ..mask import AttentionMask
from ..merge import accumulator_dtype
from ..values import Columns, Keys, Queries
from . import tuning
from .tiles import LOG2_E
from .views import NO_STRIDES, BlockLists, ColumnLists, PartStrides, QueryTiles, Scale, Strides

BLOCK_SIZES = (16, 32, 64, 128)
_ACC = {torch.float32: tl.float32, torch.float64: tl.float64}
Task = BlockTask | ColumnTask
Source = Tensor | TensorDescriptor


def settings(kernel: str, q: Tensor, mask: AttentionMask) -> tuple[tuning.Launch, dict[str, Any]]:
    """The launch of one kernel for this device and problem, and the arguments that follow from it."""
    launch = tuning.launch_for(
        kernel,
        capability=tuning.capability_of(q.device),
        block_size=mask.block_size,
        head_dim=q.shape[3],
        itemsize=q.element_size(),
    )
    return launch, {
        "BLOCK": mask.block_size,
        "M": launch.m,
        "N": launch.n,
        "D": q.shape[3],
        "TMA": launch.tma,
        "ACC": _ACC[accumulator_dtype(q.dtype)],
        "PRECISION": "ieee" if q.element_size() > 2 else "tf32",
        "num_warps": launch.warps,
        "num_stages": launch.stages,
        **launch.options(),
    }


def programs(x: Tensor, tiles: int, block_size: int, rows: int) -> tuple[int]:
    """The grid of one program per `rows` tokens of each head of x [B, S, H, D]."""
    return (x.shape[0] * x.shape[2] * tiles * (block_size // rows),)


def source(x: Tensor, limit: int, rows: int, launch: tuning.Launch) -> Source:
    """What a kernel loads tiles of x [B, S, H, D] from: itself, or a descriptor of [B, H, limit, D] that ends there."""
    if not launch.tma:
        return x
    batch, _, heads, dim = x.shape
    strides = [x.stride(0), x.stride(2), x.stride(1), 1]
    return TensorDescriptor(x, [batch, heads, max(limit, 1), dim], strides, [1, 1, rows, dim])


def line_source(row_values: Tensor, launch: tuning.Launch) -> Source:
    """row_values [B * H * 2, padded], one line's M values at a time."""
    if not launch.tma:
        return row_values
    return TensorDescriptor(row_values, list(row_values.shape), list(row_values.stride()), [1, launch.m])


def part_source(parts: Tensor, launch: tuning.Launch) -> Source:
    """Partial sums [parts, C, D], one tile of N columns at a time."""
    if not launch.tma:
        return parts
    return TensorDescriptor(parts, list(parts.shape), list(parts.stride()), [1, launch.n, parts.shape[2]])


def query_tiles(q: Tensor, task: Task, order: Tensor | None = None) -> QueryTiles:
    """The query side of a launch; order: that of its tiles, where programs own them."""
    return QueryTiles(
        order=order,
        documents=task.q_documents,
        heads=q.shape[2],
        tiles=len(task.q_side.blocks),
        valid=task.q_valid_tokens,
    )


def column_lists(columns: Columns, *, own: bool) -> ColumnLists:
    """The columns of a launch; own: attends those in a query's own block, too."""
    task: ColumnTask = columns.index.data
    return ColumnLists(
        positions=task.columns,
        usable=task.usable,
        limits=task.limits,
        documents=task.column_documents,
        q_blocks=task.q_side.device_blocks if own else None,
        capacity=task.columns.shape[1],
        words=task.usable.shape[2],
    )


def by_token(columns: Columns) -> tuple[Tensor, Tensor]:
    """k and v of columns as [B, C, H, D], like all else."""
    return columns.k.transpose(1, 2), columns.v.transpose(1, 2)


@dataclass(frozen=True, kw_only=True)
class QueryLaunch:
    """A launch with one program per query tile: of the block part, the column part, or both.

    given: the arguments that it has in any direction; at: strides of what it reads, for `out` see PartStrides.
    """

    launch: tuning.Launch
    grid: tuple[int]
    given: dict[str, Any]
    at: PartStrides

    @classmethod
    def of(cls, kernels: tuning.PartKernels, q: Tensor, keys: Keys | None, columns: Columns | None) -> QueryLaunch:
        """Choose the kernel's settings and gather its arguments."""
        task = query_task(keys, columns)
        launch, common = settings(kernels.name(keys is not None, columns is not None), q, task.mask)
        given: dict[str, Any] = {
            "q": source(q, task.q_valid_tokens, launch.m, launch),
            "queries": query_tiles(q, task, _order(keys, columns)),
            **dict.fromkeys(("k", "v", "column_k", "column_v")),
            "blocks": BlockLists(),
            "columns": ColumnLists(),
            "GROUP": 1,
            "SIGN": 1,
            **common,
        }
        at = PartStrides(q=Strides.of(q), out=NO_STRIDES)
        if keys is not None:
            index: BlockTask = keys.index.data
            lists, valid = index.queries, index.k_valid_tokens
            given |= {"k": source(keys.k, valid, launch.n, launch), "v": source(keys.v, valid, launch.n, launch)}
            given["blocks"] = BlockLists(lists.rows, lists.entries, index.k_documents, valid)
            given |= {"GROUP": q.shape[2] // keys.k.shape[2], "SIGN": lists.sign}
            at = at._replace(k=Strides.of(keys.k), v=Strides.of(keys.v))
        if columns is not None and columns.k.shape[2]:
            k, v = by_token(columns)
            given |= {name: source(x, k.shape[1], launch.n, launch) for name, x in (("column_k", k), ("column_v", v))}
            given["columns"] = column_lists(columns, own=not columns.index.mask.own_blocks)
            at = at._replace(column_k=Strides.of(k), column_v=Strides.of(v))
        grid = programs(q, len(task.q_side.blocks), task.mask.block_size, launch.m)
        return cls(launch=launch, grid=grid, given=given, at=at)


def query_task(keys: Keys | None, columns: Columns | None) -> Task:
    """The index that knows the queries; ValueError when the two were built for different ones."""
    tasks: list[Task] = [part.index.data for part in (keys, columns) if part is not None]
    first, last = tasks[0].q_side, tasks[-1].q_side
    if first is not last and not np.array_equal(first.blocks, last.blocks):
        raise ValueError("columns: their index was built for other queries than the block index")
    return tasks[0]


def _order(keys: Keys | None, columns: Columns | None) -> Tensor:
    """The order of query tiles, of the block index where there is one."""
    if keys is not None:
        return keys.index.data.queries.order
    assert columns is not None
    return columns.index.data.order


def loadable(x: Tensor) -> Tensor:
    """x, or a copy whose rows of D elements are in one piece and 16-byte aligned: what both kinds of loads need."""
    aligned = x.data_ptr() % 16 == 0 and all(s * x.element_size() % 16 == 0 for s in x.stride()[:-1])
    return x if x.stride(-1) == 1 and aligned else x.contiguous()


def check_block_size(mask: AttentionMask) -> None:
    """Raise ValueError for mask blocks that are no power of two from 16 to 128."""
    if mask.block_size not in BLOCK_SIZES:
        raise ValueError(f"mask.block_size: {mask.block_size} is not one of {BLOCK_SIZES} (triton backend)")


def check_query(q: Tensor, index: Task) -> None:
    """Raise ValueError when q is not what the index was built for."""
    heads, tokens = index.mask.heads, index.q_side.tokens
    assert q.shape[3] in HEAD_DIMS, f"heads of {q.shape[3]} reach the kernels, not padded"
    if q.shape[2] != heads or q.shape[1] != tokens:
        raise ValueError(f"q: {q.shape[2]} heads and {q.shape[1]} tokens; the index was built for {heads} and {tokens}")


def check_keys(k: Tensor, index: BlockTask) -> None:
    """Raise ValueError when k is not what the index was built for."""
    if k.shape[1] != index.k_side.tokens:
        raise ValueError(f"k: {k.shape[1]} tokens; the index was built for {index.k_side.tokens}")


def check_columns(column_k: Tensor, index: ColumnTask) -> None:
    """Raise ValueError when the gathered columns are not those of the index."""
    if column_k.shape[1:3] != index.columns.shape:
        raise ValueError(
            f"column_k: shape {tuple(column_k.shape)} is not [B, H, C, D] of columns {tuple(index.columns.shape)}"
        )


def scale_of(queries: Queries) -> Scale:
    """The factor of scores, as kernels want it."""
    return Scale(natural=queries.scale, log2=queries.scale * BASE_2)


BASE_2 = LOG2_E.value
