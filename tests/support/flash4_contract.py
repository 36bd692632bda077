"""What flash-attn-4's two functions promise, in plain torch: stands in for the wheels where there is no GPU for them.

Same arguments, layouts, types and conventions as `flash_attn.cute.interface` of 4.0.0b36; everything it would refuse is
refused. Element masks, which the wheels compile, are functions of tensors here: (query, key, aux_tensors) -> bool.
test_gpu_training.py holds the wheels themselves to the same ring, test_gpu_kernels.py to the same masks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

ElementMask = Callable[[Tensor, Tensor, Sequence[Tensor]], Tensor]

ALIGNED_ELEMENTS = 8  # 16 bytes


def _flash_attn_fwd(
    q: Tensor, k: Tensor, v: Tensor, *, out: Tensor, lse: Tensor, softmax_scale: float, causal: bool, pack_gqa: bool
) -> None:
    """Write out [B, S_q, H, D] and the natural lse [B, H, S_q]. k, v [B, S_k, H_kv, D]."""
    _check(q, k, v, out)
    assert not pack_gqa and out.shape == q.shape
    assert lse.shape == (q.shape[0], q.shape[2], q.shape[1]) and lse.dtype == torch.float32
    scores, values = _scores(q, k, softmax_scale, causal), _of_query_heads(v, q.shape[2])
    lse.copy_(scores.logsumexp(-1))
    out.copy_((scores.softmax(-1) @ values).transpose(1, 2))


@dataclass(frozen=True, kw_only=True)
class BlockSparseTensorsTorch:
    """Backward's tables: of every head and key tile, the query tiles to mask and those to take whole."""

    mask_block_cnt: Tensor
    mask_block_idx: Tensor
    full_block_cnt: Tensor
    full_block_idx: Tensor
    block_size: tuple[int, int]


def own_block_mask() -> ElementMask:
    """Causality within the own tile of 128 tokens."""
    return lambda query, key, aux: (query & 127) >= (key & 127)


def documents_mask(by_tiles: bool) -> ElementMask:
    """Causality by positions, and one document."""
    assert not by_tiles

    def mask(query: Tensor, key: Tensor, aux: Sequence[Tensor]) -> Tensor:
        q_positions, k_positions, q_documents, k_documents = aux
        return (k_positions[key] <= q_positions[query]) & (q_documents[query] == k_documents[key])

    return mask


def _flash_attn_bwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    dout: Tensor,
    lse: Tensor,
    *,
    softmax_scale: float,
    causal: bool = False,
    dlse: Tensor | None = None,
    block_sparse_tensors: BlockSparseTensorsTorch | None = None,
    mask_mod: ElementMask | None = None,
    aux_tensors: Sequence[Tensor] = (),
    dk: Tensor | None = None,
    dv: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dq, dk, dv of these keys, in their inputs' types, where out and lse are those of all keys."""
    _check(q, k, v, dout, *(x for x in (dk, dv) if x is not None))
    assert out.shape == dout.shape == q.shape and out.dtype == q.dtype and out.stride(3) == 1
    assert lse.shape == (q.shape[0], q.shape[2], q.shape[1]) and lse.dtype == torch.float32
    group, heads = q.shape[2] // k.shape[2], q.shape[2]
    queries, grad_out, total = (x.double().transpose(1, 2) for x in (q, dout, out))
    shares = (_scores(q, k, softmax_scale, causal) - lse.double()[..., None]).exp()
    if block_sparse_tensors is not None:
        assert mask_mod is not None and not causal
        allowed = _allowed(q, k, block_sparse_tensors, mask_mod, aux_tensors)
        shares = torch.where(allowed & (lse > -torch.inf)[..., None], shares, 0.0)
    delta = (grad_out * total).sum(-1, keepdim=True)
    if dlse is not None:
        assert dlse.shape == lse.shape and dlse.dtype == torch.float32
        delta = delta - dlse.double()[..., None]
    grad_scores = shares * (grad_out @ _of_query_heads(v, heads).transpose(2, 3) - delta) * softmax_scale
    grad_q = grad_scores @ _of_query_heads(k, heads)
    of_keys = (grad_scores.transpose(2, 3) @ queries, shares.transpose(2, 3) @ grad_out)
    grad_k, grad_v = (x.unflatten(1, (-1, group)).sum(2) for x in of_keys)
    targets = torch.empty_like(q), *(torch.empty_like(k) if x is None else x for x in (dk, dv))
    for target, grad in zip(targets, (grad_q, grad_k, grad_v), strict=True):
        target.copy_(grad.transpose(1, 2))
    return targets[0], targets[1], targets[2]


def _allowed(q: Tensor, k: Tensor, tables: BlockSparseTensorsTorch, mask: ElementMask, aux: Sequence[Tensor]) -> Tensor:
    """bool [H, S_q, S_k] that the tables and the mask allow."""
    rows, columns = tables.block_size
    q_tiles, k_tiles = -(-q.shape[1] // rows), -(-k.shape[1] // columns)
    found = torch.zeros(q.shape[2], q_tiles * rows, k_tiles * columns, dtype=torch.bool)
    kinds = (
        (tables.full_block_cnt, tables.full_block_idx, True),
        (tables.mask_block_cnt, tables.mask_block_idx, False),
    )
    for counts, tiles, whole in kinds:
        assert counts.shape == (1, q.shape[2], k_tiles) and tiles.shape[:3] == counts.shape
        assert counts.dtype == tiles.dtype == torch.int32
        for head in range(q.shape[2]):
            for k_tile in range(k_tiles):
                for q_tile in tiles[0, head, k_tile, : counts[0, head, k_tile]].tolist():
                    assert 0 <= q_tile < q_tiles
                    query, key = q_tile * rows + torch.arange(rows), k_tile * columns + torch.arange(columns)
                    area = found[head, query[0] : query[0] + rows, key[0] : key[0] + columns]
                    assert not area.any(), "a tile is listed once"
                    area |= torch.ones_like(area) if whole else mask(query[:, None], key[None, :], aux)
    return found[:, : q.shape[1], : k.shape[1]]


def _check(*tensors: Tensor) -> None:
    for tensor in tensors:
        assert tensor.dtype in (torch.float16, torch.bfloat16) and tensor.dtype == tensors[0].dtype
        assert tensor.dim() == 4 and tensor.stride(3) == 1
        assert all(stride % ALIGNED_ELEMENTS == 0 and stride for stride in tensor.stride()[:3])
        assert not tensor.requires_grad


def _scores(q: Tensor, k: Tensor, scale: float, causal: bool) -> Tensor:
    """Float64 scores [B, H, S_q, S_k]."""
    scores = q.double().transpose(1, 2) @ _of_query_heads(k, q.shape[2]).transpose(2, 3) * scale
    if not causal:
        return scores
    assert q.shape[1] == k.shape[1]
    return scores.masked_fill(~torch.ones(scores.shape[2:], dtype=torch.bool).tril(), -torch.inf)


def _of_query_heads(x: Tensor, heads: int) -> Tensor:
    """[B, S, H_kv, D] to float64 [B, H, S, D], repeated for the query heads of each."""
    return x.double().transpose(1, 2).repeat_interleave(heads // x.shape[2], dim=1)
