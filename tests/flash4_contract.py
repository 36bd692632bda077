"""What flash-attn-4's two functions promise, in plain torch: stands in for the wheels where there is no GPU for them.

Same arguments, layouts, types and conventions as `flash_attn.cute.interface` of 4.0.0b36; everything it would refuse is
refused. tests/test_gpu_training.py holds the wheels themselves to the same ring.
"""

from __future__ import annotations

import torch
from torch import Tensor

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


def _flash_attn_bwd(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, dout: Tensor, lse: Tensor, *, softmax_scale: float, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dq, dk, dv of these keys, in their inputs' types, where out and lse are those of all keys."""
    _check(q, k, v, out, dout)
    assert out.shape == dout.shape == q.shape
    assert lse.shape == (q.shape[0], q.shape[2], q.shape[1]) and lse.dtype == torch.float32
    group, heads = q.shape[2] // k.shape[2], q.shape[2]
    queries, grad_out, total = (x.double().transpose(1, 2) for x in (q, dout, out))
    shares = (_scores(q, k, softmax_scale, causal) - lse.double()[..., None]).exp()
    delta = (grad_out * total).sum(-1, keepdim=True)
    grad_scores = shares * (grad_out @ _of_query_heads(v, heads).transpose(2, 3) - delta) * softmax_scale
    grad_q = grad_scores @ _of_query_heads(k, heads)
    of_keys = (grad_scores.transpose(2, 3) @ queries, shares.transpose(2, 3) @ grad_out)
    grad_k, grad_v = (x.unflatten(1, (-1, group)).sum(2) for x in of_keys)
    found = [x.transpose(1, 2).to(q.dtype) for x in (grad_q, grad_k, grad_v)]
    return found[0], found[1], found[2]


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
