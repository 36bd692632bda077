"""The attention kernels that benchmarks/kernels.py compares, behind one small interface."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ...kernels.api import Queries, WholeAttention, backend_of
from ...kernels.sinks import sink_gradients, with_sinks
from . import fa4_direct
from .masks import split_diagonal

FLEX_LONGEST = 131072  # its block mask holds [H, N, N] indexes four times


@dataclass
class Problem:
    """Tensors q, k, v, grad_out [1, S, H, D] in bfloat16, the mask, and what implementations build from it once.

    softcap: of the scores; sinks [H]: learned logits. Only our backends take these.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    grad_out: Tensor
    mask: Any  # an AttentionMask; None for dense attention
    built: dict[str, Any] = field(default_factory=dict)
    index_bytes: int = 0
    softcap: float | None = None
    sinks: Tensor | None = None

    @property
    def scale(self) -> float:
        """1 / sqrt(D)."""
        return self.q.shape[-1] ** -0.5

    @property
    def queries(self) -> Queries:
        """What our backends take."""
        return Queries(q=self.q, scale=self.scale, softcap=self.softcap)

    @property
    def plain(self) -> bool:
        """Whether softmax over whole blocks is all that is asked for."""
        return self.softcap is None and self.sinks is None and self.mask.windows is None

    @property
    def positions(self) -> Tensor:
        """Global token positions [S]."""
        return torch.arange(self.q.shape[1], device=self.q.device)

    def leaves(self) -> list[Tensor]:
        """q, k, v as contiguous [1, H, S, D] leaves, the layout the libraries like best."""
        if "leaves" not in self.built:
            self.built["leaves"] = [x.transpose(1, 2).contiguous().requires_grad_() for x in (self.q, self.k, self.v)]
            self.built["leaf_grad"] = self.grad_out.transpose(1, 2).contiguous()
        return self.built["leaves"]

    @staticmethod
    def tensors(seq_len: int, heads: int, kv_heads: int, head_dim: int, seed: int) -> tuple[Tensor, ...]:
        """Random q, k, v, grad_out on the GPU."""
        generator = torch.Generator("cuda").manual_seed(seed)
        return tuple(
            torch.randn(1, seq_len, n, head_dim, device="cuda", dtype=torch.bfloat16, generator=generator)
            for n in (heads, kv_heads, kv_heads, heads)
        )


State = tuple[Any, ...]


@dataclass(frozen=True, kw_only=True)
class Implementation:
    """forward(problem) -> state, backward(problem, state) -> (dq, dk, dv); prepare builds what the mask needs.

    out(state) gives out [1, S, H, D] of a state.
    """

    forward: Callable[[Problem], State]
    backward: Callable[[Problem, State], tuple[Tensor, ...]]
    out: Callable[[State], Tensor] = lambda state: state[0]
    prepare: Callable[[Problem], None] = lambda problem: None
    supports: Callable[[Problem], bool] = lambda problem: True


def _ours(backend: str) -> Implementation:
    """One of our backends: what full_attention runs, its index built beforehand."""

    def prepare(problem: Problem) -> None:
        tokens, device = problem.q.shape[1], problem.q.device
        problem.built[backend] = whole = WholeAttention.of(problem.mask, tokens, device=device, backend=backend)
        problem.index_bytes = index_bytes(whole)

    def forward(problem: Problem) -> State:
        out, lse = problem.built[backend].forward(problem.queries, problem.k, problem.v)
        return (out, lse) if problem.sinks is None else with_sinks(out, lse, problem.sinks)

    def backward(problem: Problem, state: State) -> tuple[Tensor, ...]:
        if problem.sinks is not None:
            delta = backend_of(backend).row_products(problem.grad_out, state[0])
            sink_gradients(state[1], delta, problem.sinks)
        return problem.built[backend].backward(problem.queries, problem.k, problem.v, state, problem.grad_out)

    return Implementation(forward=forward, backward=backward, prepare=prepare)


def index_bytes(whole: WholeAttention) -> int:
    """Build both directions of the indexes, where they are made at first use, and return what they hold."""
    block = whole.block.data
    found = block.build_tables() if whole.block.backend == "flash4" else block.nbytes
    return found + (whole.column.data.nbytes if whole.column else 0)


def _autograd_backward(problem: Problem, state: State) -> tuple[Tensor, ...]:
    grads = torch.autograd.grad(state[0], problem.leaves(), problem.built["leaf_grad"], retain_graph=True)
    return tuple(x.transpose(1, 2) for x in grads)


def _dense(backend: SDPBackend) -> Implementation:
    def forward(problem: Problem) -> State:
        with sdpa_kernel(backend):
            q, k, v = problem.leaves()
            return (functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True),)

    return Implementation(forward=forward, backward=_autograd_backward, out=_heads_inside)


def _in_reach(problem: Problem) -> bool:
    """Whether libraries that take whole blocks and an index of all pairs of them can be asked."""
    return problem.plain and problem.mask.columns is None and problem.q.shape[1] <= FLEX_LONGEST


def _heads_inside(state: State) -> Tensor:
    return state[0].transpose(1, 2)


def _causal(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return query >= key


def _flex_prepare(problem: Problem) -> None:
    from torch.nn.attention.flex_attention import BlockMask

    active, diagonal = split_diagonal(problem.mask)
    full_index = torch.argsort(active.int(), dim=-1, descending=True, stable=True).int()[None]
    partial_index = torch.zeros_like(full_index)
    partial_index[..., 0] = torch.arange(problem.mask.blocks, device="cuda")
    problem.built["flex"] = BlockMask.from_kv_blocks(
        diagonal.int()[None].contiguous(),
        partial_index,
        active.sum(-1).int()[None],
        full_index,
        BLOCK_SIZE=problem.mask.block_size,
        mask_mod=_causal,
    )


def _flex(tma: bool) -> Implementation:
    @cache
    def compiled() -> Callable[..., Any]:
        from torch.nn.attention.flex_attention import flex_attention

        return torch.compile(flex_attention, dynamic=False)

    given = {"enable_gqa": True, "return_lse": True, "kernel_options": {"USE_TMA": True} if tma else {}}
    return Implementation(
        forward=lambda problem: compiled()(*problem.leaves(), block_mask=problem.built["flex"], **given),
        backward=_autograd_backward,
        out=_heads_inside,
        prepare=_flex_prepare,
        supports=lambda problem: _in_reach(problem),
    )


DENSE = {"cudnn-dense": _dense(SDPBackend.CUDNN_ATTENTION), "fa2-dense": _dense(SDPBackend.FLASH_ATTENTION)}
SPARSE = {"ours-triton": _ours("triton"), "flex": _flex(tma=False), "flex-tma": _flex(tma=True)}

if fa4_direct.runs_here():
    SPARSE["ours-flash4"] = replace(
        _ours("flash4"), supports=lambda problem: problem.plain and problem.mask.block_size == fa4_direct.BLOCK_SIZE
    )
    SPARSE["fa4"] = Implementation(
        forward=fa4_direct.forward,
        backward=fa4_direct.backward,
        prepare=fa4_direct.prepare,
        supports=lambda problem: _in_reach(problem) and problem.mask.block_size == fa4_direct.BLOCK_SIZE,
    )
