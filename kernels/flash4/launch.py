"""Launches of flash-attn-4, by groups of heads, for backend.py. The wheels are imported at first use."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor

from ..triton.passes import add_rows
from ..values import Keys, Queries, QueryGradient
from .fold import PROGRAMS_PER_MULTIPROCESSOR, LaidQueries, heads_apart, heads_together, lay_queries
from .index import Flash4Task, TileTables, head_groups
from .masks import documents_mask, own_block_mask

BLOCK_SIZE = 128  # the tile of the wheels' backward along keys
Partial = tuple[Tensor, Tensor]


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What a backward launch reads: see backend.py."""

    q: Tensor
    k: Tensor
    v: Tensor
    grad_out: Tensor
    out: Tensor
    lse: Tensor
    grad_lse: Tensor | None


@dataclass(frozen=True, kw_only=True)
class Part:
    """Gradients of the valid tokens of some heads, q's dtype, and which heads these are."""

    heads: slice
    kv_heads: slice
    grad_q: Tensor
    grad_k: Tensor
    grad_v: Tensor

    def add_keys_to(self, grad_k: Tensor, grad_v: Tensor, *, add: bool) -> None:
        """Write, or add into, the accumulators of dK and dV."""
        for whole, part in ((grad_k, self.grad_k), (grad_v, self.grad_v)):
            target = whole[:, : part.shape[1], self.kv_heads]
            add_rows(part, target, target, add=add)

    def add_query_to(self, of_query: QueryGradient) -> None:
        """Write dQ of these heads where it goes."""
        total, target = (x[:, : self.grad_q.shape[1], self.heads] for x in (of_query.total, of_query.target))
        add_rows(self.grad_q, total, target, add=of_query.add)


def zeros_like_rows(q: Tensor) -> Tensor:
    """Zeros of q's shape that take one row."""
    return torch.zeros(q.shape[3], dtype=q.dtype, device=q.device).expand(q.shape)


def attend(queries: Queries, keys: Keys, out: Tensor, lse: Tensor) -> None:
    """Write out [B, S, H, D] in q's dtype and lse [B, H, S] of the S valid queries."""
    q, index = queries.q[:, : out.shape[1]], keys.index.data
    k, v = (x[:, : index.task.k_valid_tokens] for x in (keys.k, keys.v))
    groups = launch_groups(q, k, index, transposed=False)
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


def gradient_parts(
    inputs: Inputs,
    index: Flash4Task,
    scale: float,
    grads: Mapping[str, Tensor] | None = None,
    scratch: dict[str, Any] | None = None,
) -> Iterator[Part]:
    """Launch the backward by groups of heads, each when its turn comes.

    grads: where to write "dq" [B, S_q, H, D], "dk" or "dv" [B, S_k, H_kv, D], in q's dtype; others are made. scratch:
    see BackwardQueries; with it, and no "dq", query heads may be laid end to end.
    """
    q_end, k_end = index.task.q_valid_tokens, index.task.k_valid_tokens
    for first, last in launch_groups(inputs.q, inputs.k, index, transposed=True):
        heads, kv_heads = _slices(first, last, inputs.q.shape[2] // inputs.k.shape[2])
        queries, keys = (slice(None), slice(q_end), heads), (slice(None), slice(k_end), kv_heads)
        k, v = inputs.k[keys], inputs.v[keys]
        given = {name: grad[queries if name == "dq" else keys] for name, grad in (grads or {}).items()}
        together = 1 if scratch is None else _heads_together(inputs.q[queries], k, index)
        given |= {"softmax_scale": scale, **_mask(index, together=together)}
        given["block_sparse_tensors"] = _sparse(index.tables(first, last, transposed=True, fold=together))
        if scratch is not None and together > 1:
            q, grad_out, lse, grad_lse = _laid_queries(inputs, index, scratch).end_to_end(first, last, together)
            laid = Inputs(q=q, k=k, v=v, grad_out=grad_out, out=zeros_like_rows(q), lse=lse, grad_lse=grad_lse)
            found, grad_k, grad_v = _backward(laid, given)
            grad_q = heads_apart(found, together=together, tokens=q_end)
        else:
            lines = slice(None), heads, slice(q_end)
            part = Inputs(
                q=inputs.q[queries],
                k=k,
                v=v,
                grad_out=inputs.grad_out[queries],
                out=inputs.out[queries],
                lse=inputs.lse[lines],
                grad_lse=None if inputs.grad_lse is None else inputs.grad_lse[lines],
            )
            grad_q, grad_k, grad_v = _backward(part, given)
        yield Part(heads=heads, kv_heads=kv_heads, grad_q=grad_q, grad_k=grad_k, grad_v=grad_v)


def _laid_queries(inputs: Inputs, index: Flash4Task, scratch: dict[str, Any]) -> LaidQueries:
    """All heads' queries head by head, copied by the first launch that wants them."""
    if "laid" not in scratch:
        end, grad_lse = index.task.q_valid_tokens, inputs.grad_lse
        assert grad_lse is not None
        scratch["laid"] = lay_queries(
            inputs.q[:, :end],
            inputs.grad_out[:, :end],
            inputs.lse[:, :, :end],
            grad_lse[:, :, :end],
            tokens=index.q_tiles * BLOCK_SIZE,
        )
    return scratch["laid"]


def _backward(x: Inputs, arguments: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    return wheels()[0]._flash_attn_bwd(x.q, x.k, x.v, x.out, x.grad_out, x.lse, dlse=x.grad_lse, **arguments)


def _heads_together(q: Tensor, k: Tensor, index: Flash4Task) -> int:
    """How many query heads of a launch to lay end to end: see fold.py."""
    batch, _, heads, _ = q.shape
    return heads_together(
        group=heads // k.shape[2],
        lists=batch * heads * index.k_tiles,
        tiles=index.q_tiles,
        wanted=PROGRAMS_PER_MULTIPROCESSOR * _multiprocessors(q.device),
    )


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def launch_groups(q: Tensor, k: Tensor, index: Flash4Task, *, transposed: bool) -> list[tuple[int, int]]:
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


@cache
def wheels() -> tuple[Any, Any]:
    """flash-attn-4's interface and block-sparsity modules. Raises ValueError where they cannot be imported."""
    try:
        return import_module("flash_attn.cute.interface"), import_module("flash_attn.cute.block_sparsity")
    except (ImportError, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"backend flash4: the flash-attn-4 wheels cannot be imported ({reason}): pip install --pre "
            "'sparsering[flash4]'"
        ) from error
