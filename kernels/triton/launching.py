"""What launches of the Triton kernels share: sources for tile loads, views, checks of tensors."""

from __future__ import annotations

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
from .views import BlockLists, ColumnLists, QueryTiles, Scale, strides_of

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


def source(x: Tensor, limit: int, rows: int, launch: tuning.Launch) -> Source:
    """What a kernel loads tiles of x [B, S, H, D] from: itself, or a descriptor of [B, H, limit, D] that ends there."""
    if not launch.tma:
        return x
    batch, _, heads, dim = x.shape
    strides = [x.stride(0), x.stride(2), x.stride(1), 1]
    return TensorDescriptor(x, [batch, heads, max(limit, 1), dim], strides, [1, 1, rows, dim])


def box_source(x: Tensor, box: list[int], launch: tuning.Launch) -> Source:
    """What a kernel loads or writes boxes of this shape of a contiguous x from: itself, or a descriptor of it."""
    return TensorDescriptor(x, list(x.shape), list(x.stride()), box) if launch.tma else x


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
    """The columns of a launch; own: attends those in a query's own block, or that its window cuts, too."""
    task: ColumnTask = columns.index.data
    usable, limits = task.bits
    return ColumnLists(
        positions=task.columns,
        usable=usable,
        limits=limits,
        documents=task.column_documents,
        q_blocks=task.q_side.device_blocks if own else None,
        capacity=task.columns.shape[1],
        words=usable.shape[2],
        windows=task.mask.window_lengths(),
        anchors=task.mask.anchors or None,
    )


def by_token(columns: Columns) -> dict[str, Tensor]:
    """column_k and column_v as [B, C, H, D], like all else."""
    return {"column_k": columns.k.transpose(1, 2), "column_v": columns.v.transpose(1, 2)}


def query_launch(
    kernels: dict[tuple[bool, bool], str], q: Tensor, keys: Keys | None, columns: Columns | None
) -> tuple[tuning.Launch, tuple[int], dict[str, Any]]:
    """(settings, grid, arguments of any direction) of a launch with one program per query tile."""
    task = query_task(keys, columns)
    launch, common = settings(kernels[keys is not None, columns is not None], q, task.mask)
    order = task.queries.order if isinstance(task, BlockTask) else task.q_side.order(falling=True)
    given: dict[str, Any] = {
        "q": source(q, task.q_valid_tokens, launch.m, launch),
        "queries": query_tiles(q, task, order),
        **dict.fromkeys(("k", "v", "column_k", "column_v")),
        "blocks": BlockLists(),
        "columns": ColumnLists(),
        "GROUP": 1,
        "SIGN": 1,
        **common,
    }
    tiled = {"q": q}
    if keys is not None:
        index: BlockTask = keys.index.data
        lists, valid = index.queries, index.k_valid_tokens
        tiled |= {"k": keys.k, "v": keys.v}
        given |= {name: source(tiled[name], valid, launch.n, launch) for name in ("k", "v")}
        given["blocks"] = BlockLists(lists.rows, lists.entries, index.k_documents, valid, index.query_edges)
        given |= {"GROUP": q.shape[2] // keys.k.shape[2], "SIGN": lists.sign}
    if columns is not None and columns.k.shape[2]:
        tiled |= by_token(columns)
        given |= {name: source(x, x.shape[1], launch.n, launch) for name, x in by_token(columns).items()}
        given["columns"] = column_lists(columns, own=_has_partial_blocks(columns.index.mask))
    tiles = len(task.q_side.blocks) * (task.mask.block_size // launch.m)
    return launch, (q.shape[0] * q.shape[2] * tiles,), given | {"at": strides_of(**tiled)}


def _has_partial_blocks(mask: AttentionMask) -> bool:
    """Whether a query may attend part of the columns of a block: of its own, inactive, or of one that a window cuts."""
    return not mask.own_blocks or mask.windows is not None


def query_task(keys: Keys | None, columns: Columns | None) -> Task:
    """The index that knows the queries; ValueError when the two were built for different ones."""
    tasks: list[Task] = [part.index.data for part in (keys, columns) if part is not None]
    first, last = tasks[0].q_side, tasks[-1].q_side
    if first is not last and not np.array_equal(first.blocks, last.blocks):
        raise ValueError("columns: their index was built for other queries than the block index")
    return tasks[0]


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


def check_parts(queries: Queries, keys: Keys | None, columns: Columns | None) -> None:
    """Raise ValueError when tensors are not what the indexes were built for."""
    check_query(queries.q, query_task(keys, columns))
    if keys is not None:
        check_keys(keys.k, keys.index.data)
    if columns is not None:
        shape, held = tuple(columns.k.shape), tuple(columns.index.data.columns.shape)
        if shape[1:3] != held:
            raise ValueError(f"column_k: shape {shape} is not [B, H, C, D] of columns {held}")


def scale_of(queries: Queries) -> Scale:
    """The factor of scores, as kernels want it."""
    if queries.softcap is None:
        return Scale(natural=queries.scale, log2=queries.scale * LOG2_E.value)
    log2 = queries.softcap * LOG2_E.value
    return Scale(natural=queries.scale, log2=log2, softcap=2 * queries.scale / queries.softcap * LOG2_E.value)
