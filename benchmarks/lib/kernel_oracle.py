"""Float64 values of sampled rows of sparse attention and its gradients, at lengths where all rows would be too many."""

from __future__ import annotations

import torch
from torch import Tensor

from ...kernels.mask import whole
from .kernel_impls import SPARSE, Implementation, Problem

QUERY_ROWS, KEY_ROWS = 6, 2
LARGEST_ERROR = 1.5e-2  # of bfloat16 results, relative to the norm of the row


def check(implementation: Implementation, problem: Problem, *, seed: int) -> dict[str, float]:
    """Largest relative error of out, dq, dk, dv rows; raises AssertionError above LARGEST_ERROR (NaN included)."""
    state = implementation.forward(problem)
    out = implementation.out(state)
    grads = implementation.backward(problem, state)
    generator = torch.Generator().manual_seed(seed)
    heads, seq_len = problem.q.shape[2], problem.q.shape[1]
    chosen = [0, heads // 2, heads - 1]
    rows = torch.cat([torch.randint(seq_len, (QUERY_ROWS,), generator=generator), torch.tensor([0, seq_len - 1])])
    keys = torch.randint(seq_len, (KEY_ROWS,), generator=generator)
    worst = dict.fromkeys(("out", "dq", "dk", "dv"), 0.0)
    for head in chosen:
        right = query_rows(problem, head, rows.cuda())
        for name, value in zip(("out", "dq"), (out, grads[0]), strict=True):
            worst[name] = max(worst[name], _error(value[0, rows.cuda(), head], right[name]))
    lse, delta = _row_sums(problem, out)
    for kv_head in {0, problem.k.shape[2] - 1}:
        right = key_rows(problem, kv_head, keys.cuda(), lse, delta)
        for name, value in zip(("dk", "dv"), grads[1:], strict=True):
            worst[name] = max(worst[name], _error(value[0, keys.cuda(), kv_head], right[name]))
    assert all(error < LARGEST_ERROR for error in worst.values()), f"wrong: {worst}"
    return {name: round(error, 5) for name, error in worst.items()}


def query_rows(problem: Problem, head: int, rows: Tensor) -> dict[str, Tensor]:
    """out and dq [rows, D] of one head, every key at once, in float64."""
    mask, positions = problem.mask, problem.positions
    kv_head = head // (problem.q.shape[2] // problem.k.shape[2])
    q, grad_out = (x[0, rows, head].double() for x in (problem.q, problem.grad_out))
    k, v = (x[0, :, kv_head].double() for x in (problem.k, problem.v))
    attended = whole(mask, head, rows, positions)
    scores, slopes = scores_of(problem, q @ k.T)
    scores = scores.masked_fill(~attended, -torch.inf)
    if problem.sinks is not None:
        scores = torch.cat([scores, problem.sinks[head].double().expand(len(rows), 1)], dim=1)
    weights = torch.softmax(scores, -1).nan_to_num(0.0)[:, : len(positions)]
    out = weights @ v
    delta = (grad_out * out).sum(-1, keepdim=True)
    return {"out": out, "dq": (weights * (grad_out @ v.T - delta) * slopes) @ k * problem.scale}


def scores_of(problem: Problem, products: Tensor) -> tuple[Tensor, Tensor | float]:
    """The scores of products of queries and keys, and by how much a softcap flattens each."""
    scores = products * problem.scale
    if problem.softcap is None:
        return scores, 1.0
    flat = torch.tanh(scores / problem.softcap)
    return flat * problem.softcap, 1 - flat**2


def key_rows(problem: Problem, kv_head: int, keys: Tensor, lse: Tensor, delta: Tensor) -> dict[str, Tensor]:
    """dk and dv [keys, D] of one KV head in float64, from lse and delta [H, S] of all query rows."""
    mask, positions = problem.mask, problem.positions
    group = problem.q.shape[2] // problem.k.shape[2]
    k, v = (x[0, keys, kv_head].double() for x in (problem.k, problem.v))
    grad_k, grad_v = torch.zeros_like(k), torch.zeros_like(v)
    for head in range(kv_head * group, (kv_head + 1) * group):
        q, grad_out = (x[0, :, head].double() for x in (problem.q, problem.grad_out))
        attended = whole(mask, head, positions, keys)
        scores, slopes = scores_of(problem, q @ k.T)
        weights = torch.where(attended, torch.exp(scores - lse[head][:, None]), 0.0)
        grad_v += weights.T @ grad_out
        grad_k += (weights * (grad_out @ v.T - delta[head][:, None]) * slopes).T @ q * problem.scale
    return {"dk": grad_k, "dv": grad_v}


def _row_sums(problem: Problem, out: Tensor) -> tuple[Tensor, Tensor]:
    """lse (ours, whose rows the forward check samples) and delta [H, S] in float64."""
    if "lse" not in problem.built:
        if "triton" not in problem.built:
            SPARSE["ours-triton"].prepare(problem)
        problem.built["lse"] = SPARSE["ours-triton"].forward(problem)[1][0].double()
    delta = (problem.grad_out[0].double() * out[0].double()).sum(-1).T
    return problem.built["lse"], delta


def _error(value: Tensor, right: Tensor) -> float:
    """Largest error of a row, relative to its norm or, where that is smaller, to the mean norm of the rows."""
    size = right.norm(dim=-1)
    size = torch.maximum(size, size.mean())
    return float(((value.double() - right).norm(dim=-1) / size).max())
