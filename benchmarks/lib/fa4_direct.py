"""flash-attn-4 called directly, by its public function, with tables of its own: what our flash4 backend is measured by.

Nothing here is shared with kernels/flash4/backend.py. One sequence, whole, on one device; no columns, no documents.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from .masks import split_diagonal

BLOCK_SIZE = 128


def runs_here() -> bool:
    """Whether the wheels are installed and the GPU is one whose kernels take blocks of 128 tokens both ways."""
    if find_spec("flash_attn") is None or find_spec("flash_attn.cute") is None:
        return False
    return torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)


@cache
def _diagonal_mask() -> Any:
    cute = import_module("cutlass.cute")

    @cute.jit
    def diagonal(batch, head, query, key, seqlen_info, aux_tensors):
        return query >= key

    return diagonal


def _tables(active: Tensor, diagonal: Tensor) -> Any:
    """Tables of active [H, rows, tiles] (own block excepted) and of the own blocks, diagonal [H, rows]."""
    sparsity = import_module("flash_attn.cute.block_sparsity")
    heads, rows, _ = active.shape
    tiles = torch.argsort(active.to(torch.int8), dim=-1, descending=True, stable=True)
    own = torch.arange(rows, dtype=torch.int32, device=active.device).expand(1, heads, rows)[..., None].contiguous()
    return sparsity.BlockSparseTensorsTorch(
        mask_block_cnt=diagonal.to(torch.int32)[None].contiguous(),
        mask_block_idx=own,
        full_block_cnt=active.sum(-1, dtype=torch.int32)[None],
        full_block_idx=tiles.to(torch.int32)[None].contiguous(),
        block_size=(BLOCK_SIZE, BLOCK_SIZE),
    )


def prepare(problem: Any) -> None:
    """Build the tables of both directions."""
    active, diagonal = split_diagonal(problem.mask)
    problem.built["fa4"] = _tables(active, diagonal), _tables(active.transpose(1, 2), diagonal)
    problem.index_bytes = sum(
        t.numel() * t.element_size() for tables in problem.built["fa4"] for t in tables if isinstance(t, Tensor)
    )


def forward(problem: Any) -> tuple[Any, ...]:
    """(out, lse) with their graph."""
    interface = import_module("flash_attn.cute.interface")
    if "fa4-leaves" not in problem.built:
        problem.built["fa4-leaves"] = [x.detach().requires_grad_() for x in (problem.q, problem.k, problem.v)]
    of_queries, of_keys = problem.built["fa4"]
    return interface.flash_attn_func(
        *problem.built["fa4-leaves"],
        softmax_scale=problem.scale,
        mask_mod=_diagonal_mask(),
        block_sparse_tensors=of_queries,
        block_sparse_tensors_bwd=of_keys,
        return_lse=True,
    )


def backward(problem: Any, state: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """(dq, dk, dv)."""
    return torch.autograd.grad(state[0], problem.built["fa4-leaves"], problem.grad_out, retain_graph=True)
