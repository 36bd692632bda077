"""Launches of flash-attn-4, by groups of heads, for backend.py. The wheels are imported at first use."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Any

import numpy as np
import torch
import torch.nn.functional as functional
from torch import Tensor

from ..triton.launching import loadable
from ..triton.passes import add_rows
from ..values import BackwardQueries, KeyGradients, Keys, Queries, QueryGradient
from .fold import PROGRAMS_PER_MULTIPROCESSOR, end_to_end, heads_apart, heads_together, lay_queries
from .index import Flash4Task, TileTables, head_groups

BLOCK_SIZE = 128  # the tile of the wheels' backward along keys


def attend(queries: Queries, keys: Keys, out: Tensor, lse: Tensor) -> None:
    """Write out [B, S, H, D] in q's dtype and lse [B, H, S] of the S valid queries."""
    q, index = queries.q[:, : out.shape[1]], keys.index.data
    k, v = (x[:, : index.task.k_valid_tokens] for x in (keys.k, keys.v))
    groups = _launch_groups(q, k, index, transposed=False)
    by_tiles = _by_tiles(q.device)
    if not groups:
        out.zero_()
        lse.fill_(-torch.inf)
    for first, last in groups:
        heads, kv_heads = _slices(first, last, q.shape[2] // k.shape[2])
        shared = {"softmax_scale": queries.scale, "pack_gqa": False, **_mask(index, by_tiles=by_tiles)}
        tables = index.tables(first, last, transposed=False)
        tensors = q[:, :, heads], k[:, :, kv_heads], v[:, :, kv_heads], out[:, :, heads], lse[:, heads]
        if not by_tiles:
            _launch_forward(*tensors, _sparse(tables), shared)
            continue
        for entry in range(q.shape[0]):
            _attend_by_tiles(*[x[entry : entry + 1] for x in tensors], tables=tables, shared=shared)


def _attend_by_tiles(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, tables: TileTables, shared: dict[str, Any]
) -> None:
    """Attend one batch entry, [1, S, H, D], as if each of its query tiles were a sequence.

    On 10.0 the wheels take 256 queries a row of blocks, unless a sequence has no more than 128.
    """
    tokens, tiles = q.shape[1], tables.full_counts.shape[2]
    missing = tiles * BLOCK_SIZE - tokens
    whole_q, whole_out, whole_lse = q[0], out[0], lse[0]
    if missing:
        whole_q = functional.pad(whole_q, (0, 0, 0, 0, 0, missing))
        whole_out = torch.empty_like(whole_q)
        whole_lse = lse.new_empty(lse.shape[1], tiles * BLOCK_SIZE)
    _launch_forward(
        whole_q.unflatten(0, (tiles, BLOCK_SIZE)),
        k.expand(tiles, -1, -1, -1),
        v.expand(tiles, -1, -1, -1),
        whole_out.unflatten(0, (tiles, BLOCK_SIZE)),
        whole_lse.unflatten(1, (tiles, BLOCK_SIZE)).transpose(0, 1),
        _sparse(tables.rows_as_batch()),
        shared,
    )
    if missing:
        out[0], lse[0] = whole_out[:tokens], whole_lse[:, :tokens]


def _launch_forward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, sparse: Any, shared: dict[str, Any]
) -> None:
    wheels()[0]._flash_attn_fwd(q, k, v, out=out, lse=lse, block_sparse_tensors=sparse, **shared)


def key_gradients(queries: BackwardQueries, keys: Keys, of_query: QueryGradient, into: KeyGradients) -> None:
    """Launch by groups of heads, each when its turn comes, and put the parts where they go.

    flash-attn-4 computes delta = rowsum(grad_out * out) - grad_lse itself: it gets out = 0 and grad_lse = -delta.
    With queries.scratch query heads may be laid end to end, see fold.py.
    """
    q, k, index, scratch, final = queries.q, keys.k, keys.index.data, queries.scratch, of_query.final
    q_end, k_end, group = index.task.q_valid_tokens, index.task.k_valid_tokens, q.shape[2] // k.shape[2]
    groups = _launch_groups(q, k, index, transposed=True)
    shared = bool(groups) and groups[0][1] - groups[0][0] < group  # KV heads in several launches
    if not into.add:
        written = 0 if shared or not groups else k_end
        into.k[:, written:], into.v[:, written:] = 0, 0
    of_query.finish_rows(q_end if groups else 0)
    # The wheels write dQ themselves in a single launch that begins and ends the sum, dK and dV where they end there.
    single = final is not None and not of_query.add and scratch is None and loadable(final) is final
    rounded, wide = into.k.dtype == q.dtype, into
    if rounded and shared:
        sums = (torch.zeros_like(x, dtype=of_query.total.dtype) for x in (into.k, into.v))
        wide = KeyGradients(**dict(zip("kv", sums, strict=True)), add=True)
    grad_out, lse, grad_lse = queries.grad_out.to(q.dtype), queries.lse, -queries.delta
    zeros = torch.zeros(q.shape[3], dtype=q.dtype, device=q.device)
    for first, last in groups:
        heads, kv_heads = _slices(first, last, group)
        rows, lines, of_keys = np.s_[:, :q_end, heads], np.s_[:, heads, :q_end], np.s_[:, :k_end, kv_heads]
        together = 1
        if scratch is not None:
            lists, wanted = q.shape[0] * (last - first), PROGRAMS_PER_MULTIPROCESSOR * _multiprocessors(q.device)
            tiles = {"lists": lists * index.k_tiles, "tiles": index.q_tiles}
            together = heads_together(group=min(group, last - first), **tiles, wanted=wanted)
        if scratch is not None and together > 1:
            if "laid" not in scratch:  # copied by the first launch that wants them
                whole = q[:, :q_end], grad_out[:, :q_end], lse[:, :, :q_end], grad_lse[:, :, :q_end]
                scratch["laid"] = lay_queries(*whole, tokens=index.q_tiles * BLOCK_SIZE)
            its_q, its_grad_out, its_lse, its_grad_lse = end_to_end(scratch["laid"], heads, together)
        else:
            its_q, its_grad_out, its_lse, its_grad_lse = q[rows], grad_out[rows], lse[lines], grad_lse[lines]
        given = {"dq": final[rows]} if single and final is not None else {}
        given |= {"dk": into.k[of_keys], "dv": into.v[of_keys]} if rounded and not shared else {}
        found = wheels()[0]._flash_attn_bwd(
            its_q, k[of_keys], keys.v[of_keys], zeros.expand(its_q.shape), its_grad_out, its_lse, dlse=its_grad_lse,
            softmax_scale=queries.scale, **_mask(index, together=together), **given,
            block_sparse_tensors=_sparse(index.tables(first, last, transposed=True, fold=together)),
        )  # fmt: skip
        if "dq" not in given:
            grad_q = heads_apart(found[0], together=together, tokens=q_end) if together > 1 else found[0]
            add_rows(grad_q, of_query.total[rows], of_query.target[rows], add=of_query.add)
        if "dk" not in given:
            for part, target in zip(found[1:], (wide.k, wide.v), strict=True):
                add_rows(part, target[of_keys], target[of_keys], add=into.add or shared)
    if wide is not into:
        into.put(wide.k, wide.v)


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _launch_groups(q: Tensor, k: Tensor, index: Flash4Task, *, transposed: bool) -> list[tuple[int, int]]:
    """Heads of each launch; none where there is nothing to compute."""
    if not (q.shape[0] and index.task.q_valid_tokens and index.task.k_valid_tokens):
        return []
    return head_groups(q.shape[2], q.shape[2] // k.shape[2], index.table_bytes_of_a_head(transposed=transposed))


def _slices(first: int, last: int, group: int) -> tuple[slice, slice]:
    """Query heads first .. last - 1 and their KV heads."""
    return slice(first, last), slice(first // group, (last - 1) // group + 1)


@cache
def _by_tiles(device: torch.device) -> bool:
    """Whether forward launches take query tiles as a batch: see _attend_by_tiles."""
    return torch.cuda.get_device_capability(device)[0] == 10


def _sparse(tables: TileTables) -> Any:
    return wheels()[1].BlockSparseTensorsTorch(
        mask_block_cnt=tables.partial_counts,
        mask_block_idx=tables.partial_tiles,
        full_block_cnt=tables.full_counts,
        full_block_idx=tables.full_tiles,
        block_size=(BLOCK_SIZE, BLOCK_SIZE),
    )


def _mask(index: Flash4Task, *, together: int = 1, by_tiles: bool = False) -> dict[str, Any]:
    """The element mask of partial tiles and what it reads, for query heads of which so many are end to end."""
    q, k = index.q_documents, index.k_documents
    if q is None or k is None:
        return {"mask_mod": own_block_mask()}
    positions, documents = q.positions, q.tokens
    if together > 1:
        positions, documents = positions.repeat(together), documents.repeat(together)
    return {"mask_mod": documents_mask(by_tiles), "aux_tensors": [positions, k.positions, documents, k.tokens]}


# Element masks of partial tiles, in CuTe's language, as flash-attn-4 compiles them into its kernels. A mask sees local
# token indexes. Every local tile is one whole mask block: causality in a row's own block needs only offsets there.


@cache
def own_block_mask() -> Any:
    """Causality within the row's own block of 128 tokens."""
    cute: Any = import_module("cutlass.cute")

    @cute.jit
    def mask(batch, head, query, key, seqlen_info, aux_tensors):
        return (query & 127) >= (key & 127)

    return mask


@cache
def documents_mask(by_tiles: bool) -> Any:
    """Causality by positions, and one document. It reads int32 positions and documents of queries and of keys.

    by_tiles: the batch index is the query tile, and queries count from 0 in each.
    """
    cutlass: Any = import_module("cutlass")
    cute: Any = import_module("cutlass.cute")
    as_vector = import_module("flash_attn.cute.utils").scalar_to_ssa

    @cute.jit
    def mask(batch, head, query, key, seqlen_info, aux_tensors):
        q_positions, k_positions, q_documents, k_documents = aux_tensors
        row = query[0] + (batch[0] * 128 if cutlass.const_expr(by_tiles) else 0)
        causal = as_vector(k_positions[key[0]], cutlass.Int32) <= as_vector(q_positions[row], cutlass.Int32)
        q_document = as_vector(q_documents[row], cutlass.Int32)
        return causal & (q_document == as_vector(k_documents[key[0]], cutlass.Int32))

    return mask


@cache
def wheels() -> tuple[Any, Any]:
    """flash-attn-4's interface and block-sparsity modules. Raises ValueError where they cannot be imported."""
    try:
        return import_module("flash_attn.cute.interface"), import_module("flash_attn.cute.block_sparsity")
    except (ImportError, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"backend flash4: the flash-attn-4 wheels cannot be imported ({reason}): "
            "pip install --pre 'sparsering[flash4]'"
        ) from error
