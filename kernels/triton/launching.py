"""What launches of the Triton kernels share: sources for tile loads, arguments by name, checks of tensors."""

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
from ..jit import run
from ..mask import AttentionMask
from ..merge import accumulator_dtype
from . import tuning
from .backward import prepare_from_out_kernel, prepare_kernel
from .tiles import LOG2_E

BLOCK_SIZES = (16, 32, 64, 128)
PREPARE_ROWS, PREPARE_OUT_ROWS = 1024, 64
_ACC = {torch.float32: tl.float32, torch.float64: tl.float64}
# Arguments that only one part of a launch reads: without that part they are None.
BLOCK_ONLY = ("row_fields", "entries", "k_documents", "k", "v", "k_b", "k_s", "k_h", "v_b", "v_s", "v_h", "k_valid")
COLUMN_ONLY = (
    "column_k",
    "column_v",
    "columns",
    "usable",
    "limits",
    "q_blocks",
    "column_documents",
    "ck_b",
    "ck_h",
    "ck_s",
    "cv_b",
    "cv_h",
    "cv_s",
    "capacity",
    "words",
)

Task = BlockTask | ColumnTask
Columns = tuple[Tensor, Tensor, ColumnTask]  # column_k, column_v [B, H, C, D] and their index
Partial = tuple[Tensor, Tensor]
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


def strides(**tensors: Tensor) -> dict[str, int]:
    """name_b, name_s, name_h of tensors [B, S, H, D]."""
    return {f"{name}_{axis}": x.stride(i) for name, x in tensors.items() for i, axis in enumerate("bsh")}


def query_arguments(q: Tensor, index: Task, launch: tuning.Launch) -> dict[str, Any]:
    """Arguments about the query side of a launch that has one program per query tile."""
    return {
        "q": source(q, index.q_valid_tokens, launch.m, launch),
        **strides(q=q),
        "heads": q.shape[2],
        "tiles": len(index.q_side.blocks),
        "q_valid": index.q_valid_tokens,
        "q_documents": index.q_documents,
        "DOCUMENTS": index.q_documents is not None,
    }


def block_arguments(
    k: Tensor | None, v: Tensor | None, index: BlockTask | None, heads: int, launch: tuning.Launch
) -> dict[str, Any]:
    """Arguments of the block part of a query-tile launch; without an index, what leaves that part out."""
    if k is None or v is None or index is None:
        return dict.fromkeys(BLOCK_ONLY) | {"GROUP": 1, "SIGN": 1, "BLOCKS": False}
    lists, valid = index.queries, index.k_valid_tokens
    return {
        "k": source(k, valid, launch.n, launch),
        "v": source(v, valid, launch.n, launch),
        **strides(k=k, v=v),
        "row_fields": lists.rows,
        "entries": lists.entries,
        "k_documents": index.k_documents,
        "k_valid": valid,
        "GROUP": heads // k.shape[2],
        "SIGN": lists.sign,
        "BLOCKS": True,
    }


def column_arguments(
    column_k: Tensor | None, column_v: Tensor | None, index: ColumnTask | None, launch: tuning.Launch
) -> dict[str, Any]:
    """Arguments of the column part of a launch; without an index or columns, what leaves that part out.

    column_k, column_v [B, H, C, D].
    """
    if column_k is None or column_v is None or index is None or not index.columns.shape[1]:
        return dict.fromkeys(COLUMN_ONLY) | {"COLUMNS": False, "OWN": False}
    capacity = index.columns.shape[1]
    ck, cv = column_k.transpose(1, 2), column_v.transpose(1, 2)
    return {
        "column_k": source(ck, capacity, launch.n, launch),
        "column_v": source(cv, capacity, launch.n, launch),
        **strides(ck=ck, cv=cv),
        "columns": index.columns,
        "usable": index.usable,
        "limits": index.limits,
        "q_blocks": index.q_side.device_blocks,
        "column_documents": index.column_documents,
        "capacity": capacity,
        "words": index.usable.shape[2],
        "COLUMNS": True,
        "OWN": not index.mask.own_blocks,
    }


def query_task(index: BlockTask | None, columns: Columns | None) -> Task:
    """The index that knows the queries; ValueError when the two were built for different ones."""
    if columns is not None:
        check_columns(columns[0], columns[2])
        other = columns[2].q_side
        if index is not None and index.q_side is not other and not np.array_equal(index.q_side.blocks, other.blocks):
            raise ValueError("columns: their index was built for other queries than the block index")
    task = index if index is not None else columns[2] if columns else None
    assert task is not None
    return task


def query_order(index: BlockTask | None, columns: Columns | None) -> Tensor:
    """The order of query tiles, of the block index where there is one."""
    if index is not None:
        return index.queries.order
    assert columns is not None
    return columns[2].order


def both_parts(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    index: BlockTask | None,
    columns: Columns | None,
    launch: tuning.Launch,
) -> dict[str, Any]:
    """Arguments of a query-tile launch for the block part, the column part, or both."""
    column_k, column_v, column_task_ = columns or (None, None, None)
    if column_k is not None and column_v is not None:
        column_k, column_v = loadable(column_k), loadable(column_v)
    return {
        **block_arguments(k, v, index, q.shape[2], launch),
        **column_arguments(column_k, column_v, column_task_, launch),
    }


def row_values_of(lse: Tensor, delta: Tensor, index: Task, scale: float) -> Tensor:
    """lse and scale * delta [B, H, S_q] as the backward kernels read them: [B * H * 2, tokens of whole tiles]."""
    lse, delta = (x if x.stride(-1) == 1 else x.contiguous() for x in (lse, delta))
    values = _empty_row_values(lse, index)
    batch, heads, _ = lse.shape
    run(
        prepare_kernel,
        (-(-values.shape[1] // PREPARE_ROWS), batch * heads),
        lse,
        delta,
        values,
        *lse.stride()[:2],
        *delta.stride()[:2],
        heads,
        index.q_valid_tokens,
        values.shape[1],
        scale,
        SIZE=PREPARE_ROWS,
    )
    return values


def row_values_from_out(out: Tensor, grad_out: Tensor, lse: Tensor, index: Task, scale: float) -> Tensor:
    """The same from out and grad_out [B, S_q, H, D]: delta = rowsum(grad_out * out)."""
    lse = lse if lse.stride(-1) == 1 else lse.contiguous()
    values = _empty_row_values(lse, index)
    batch, _, heads, dim = out.shape
    run(
        prepare_from_out_kernel,
        (-(-values.shape[1] // PREPARE_OUT_ROWS), batch * heads),
        out,
        grad_out,
        lse,
        values,
        *out.stride()[:3],
        *grad_out.stride()[:3],
        *lse.stride()[:2],
        heads,
        index.q_valid_tokens,
        values.shape[1],
        scale,
        SIZE=PREPARE_OUT_ROWS,
        D=dim,
    )
    return values


def _empty_row_values(lse: Tensor, index: Task) -> Tensor:
    padded = len(index.q_side.blocks) * index.mask.block_size
    return torch.empty(lse.shape[0] * lse.shape[1] * 2, padded, dtype=lse.dtype, device=lse.device)


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


BASE_2 = LOG2_E.value
