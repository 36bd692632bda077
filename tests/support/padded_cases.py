"""Problems of heads that the Triton kernels compute padded, and ways to compute them; plans for such heads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

import kernel_calls as calls
from sparsering.kernels import api
from sparsering.kernels.mask import AttentionMask, whole
from sparsering.kernels.plain.reference import reference_attention, reference_gradients
from sparsering.planner.layouts.gather import Gather
from sparsering.planner.plan import AttentionSpec, KernelSpec, ModelShape, PatternSpec, Plan, make_plan
from sparsering.planner.schedule.placement import striped
from sparsering.planner.specs import DType

pytest.importorskip("triton")

BETWEEN = [dim for dim in range(8, 512, 8) if dim not in (16, 32, 64, 128, 256)]
SCALE = 0.3
NAMES = ("out", "lse", "dq", "dk", "dv")
Tensors = list[torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """One seeded problem: head 0 has no active block, what lies behind the sequence is NaN."""

    head_dim: int
    tokens: int = 150
    padding: int = 10
    block: int = 32
    toeplitz: bool = True
    heads: tuple[int, int] = (4, 2)
    columns: int = 40
    documents: bool = False
    batch: int = 1
    dtype: torch.dtype = torch.float64

    def make(self, device: str = "cpu") -> tuple[Tensors, AttentionMask]:
        """([grad_out, q, k, v], mask)."""
        generator = torch.Generator().manual_seed(self.head_dim)
        heads, kv_heads = self.heads
        blocks = -(-self.tokens // self.block)
        shape = (heads, blocks) if self.toeplitz else (heads, blocks, blocks)
        active = torch.rand(shape, generator=generator) < 0.5
        active[0] = False
        columns = None
        if self.columns:
            late = self.tokens // 4  # head 0 has no column before, so that its first rows are empty
            firsts = [late] + [0] * (heads - 1)
            drawn = [n + torch.randperm(self.tokens - n, generator=generator)[: self.columns] for n in firsts]
            columns = torch.stack([one.sort().values for one in drawn]).int()
            columns[-1, self.columns // 2 :] = self.tokens
        at = torch.arange(self.tokens + self.padding)
        mask = AttentionMask(
            seq_len_tokens=self.tokens, block_size=self.block, active=active, columns=columns,
            documents=(at // (self.tokens // 3)).int() if self.documents else None,
        )  # fmt: skip
        sizes = [(self.batch, len(at), count, self.head_dim) for count in (heads, heads, kv_heads, kv_heads)]
        tensors = [torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes]
        for tensor in tensors:
            tensor[:, self.tokens :] = torch.nan
        return [tensor.to(device, self.dtype) for tensor in tensors], mask.to(device)


def reference(tensors: Tensors, mask: AttentionMask) -> Tensors:
    grad_out, q, k, v = tensors
    grads = reference_gradients(grad_out, q, k, v, mask, scale=SCALE)
    return [*reference_attention(q, k, v, mask, scale=SCALE), *grads]


def at_once(tensors: Tensors, mask: AttentionMask) -> Tensors:
    grad_out, *inputs = tensors
    q, k, v = (x.detach().clone().requires_grad_() for x in inputs)
    out, lse = api.full_attention(q, k, v, mask, scale=SCALE, backend="triton")
    return [out.detach(), lse, *torch.autograd.grad(out, (q, k, v), grad_out)]


def by_tasks(tensors: Tensors, mask: AttentionMask, *, apart: bool = False, narrow: bool = False) -> Tensors:
    """As a ring plays it: two shards of every other block; columns in the first launch, results ended by the last one.

    apart: columns in a launch of their own. narrow: dK and dV of a task are rounded to q's dtype. Accumulators hold
    NaN until they are begun.
    """
    grad_out, q, k, v = tensors
    everything, accumulator = torch.arange(q.shape[1], device=q.device), api.accumulator_dtype(q.dtype)
    blocks = everything.split(mask.block_size)
    shards = [torch.cat(blocks[0::2]), torch.cat(blocks[1::2])]
    common: dict[str, Any] = {"scale": SCALE}
    indexes = [api.column_index(mask, at, backend="triton") for at in shards]
    gathered = sum(api.gather_columns(k[:, at], v[:, at], index) for at, index in zip(shards, indexes, strict=True))
    assert isinstance(gathered, torch.Tensor) and gathered.shape[-1] == q.shape[3]
    grad_columns = torch.zeros_like(gathered, dtype=accumulator)
    whole_grads = [torch.full_like(x, torch.nan, dtype=accumulator) for x in (q, k, v)]
    key_grads = [[torch.full_like(x[:, at], torch.nan, dtype=accumulator) for x in (k, v)] for at in shards]
    begun: set[int] = set()
    out, lse = torch.full_like(q, torch.nan), whole_grads[0].new_full((q.shape[0], q.shape[2], q.shape[1]), torch.nan)
    for own, at in enumerate(shards):
        columns, partial = (gathered[0], gathered[1], indexes[own]), None
        order = [1 - own, own]
        if apart:
            partial = calls.column_forward(q[:, at], *columns, **common)
        for number, other in enumerate(order):
            keys = shards[other]
            index = api.block_index(mask, at, keys, backend="triton")
            given = {"columns": None if apart or number else columns, "into": partial, "final": number == 1}
            partial = calls.block_forward(q[:, at], k[:, keys], v[:, keys], index, **common, **given)
        assert partial is not None and partial[0].dtype == q.dtype and partial[0].shape == q[:, at].shape
        out[:, at], lse[:, :, at] = partial
        rows = lse[:, :, at], api.backend_of("triton").row_products(grad_out[:, at], partial[0])
        total = torch.full_like(q[:, at], torch.nan, dtype=accumulator)
        final = torch.full_like(q[:, at], torch.nan) if accumulator != q.dtype else None
        if apart:
            into = dict(zip(("grad_column_k", "grad_column_v"), grad_columns, strict=True))
            calls.column_backward(
                grad_out[:, at], q[:, at], *columns[:2], *rows, columns[2], grad_q=total, add_q=False, **into, **common
            )
        for number, other in enumerate(order):
            keys = shards[other]
            index = api.block_index(mask, at, keys, backend="triton")
            grads, add = key_grads[other], other in begun
            if narrow:
                grads, add = [torch.full_like(x[:, keys], torch.nan) for x in (k, v)], False
            given = {} if apart or number else {"columns": columns, "grad_columns": (grad_columns[0], grad_columns[1])}
            calls.block_backward(
                grad_out[:, at], q[:, at], k[:, keys], v[:, keys], *rows, index, grad_q=total, grad_k=grads[0],
                grad_v=grads[1], add_q=apart or number > 0, add_kv=add, final_q=final if number else None, **given,
                **common,
            )  # fmt: skip
            for ours, part in zip(key_grads[other], grads, strict=True):
                if narrow:
                    api.backend_of("triton").add_up(ours, part[None], add=other in begun)
            begun.add(other)
        whole_grads[0][:, at] = (total if final is None else final).to(accumulator)
    for at, index, (grad_k, grad_v) in zip(shards, indexes, key_grads, strict=True):
        api.scatter_columns((grad_columns[0], grad_columns[1]), index, api.KeyGradients(k=grad_k, v=grad_v, add=True))
        whole_grads[1][:, at], whole_grads[2][:, at] = grad_k, grad_v
    return [out, lse, *whole_grads]


def assert_same(ours: Tensors, right: Tensors, valid: int, tolerance: float) -> None:
    dead = right[1] == -torch.inf
    assert dead[:, :, :valid].any(), "no row is empty"
    assert torch.equal(ours[1] == -torch.inf, dead) and (ours[0].transpose(1, 2)[dead] == 0).all()
    for name, found, wanted in zip(NAMES, ours, right, strict=True):
        assert found.shape == wanted.shape, name
        if name == "lse":
            torch.testing.assert_close(found.double(), wanted, atol=tolerance, rtol=0, msg=name)
        else:
            assert torch.isfinite(found).all(), f"{name} holds NaN or inf"
            torch.testing.assert_close(found[:, :valid].double(), wanted[:, :valid], atol=tolerance, rtol=0, msg=name)


def check_in_sixteen_bits(case: Drawn, device: str, *, narrow: bool) -> None:
    """Hold the error of every result to twice that of plain torch; narrow: a task's dK and dV are rounded once more."""
    tensors, mask = case.make(device)
    right, ours = reference(tensors, mask), by_tasks(tensors, mask, narrow=narrow)
    plain = plain_torch(tensors, mask)
    valid = slice(0, case.tokens)
    torch.testing.assert_close(ours[1].double(), right[1], atol=2e-3, rtol=0)
    for name, found, theirs, wanted in zip(NAMES, ours, plain, right, strict=True):
        if name != "lse":
            error, allowed = ((x.double() - wanted)[:, valid].abs().max() for x in (found, theirs))
            assert torch.isfinite(found).all(), name
            assert error <= 2 * allowed, f"{name}: {error:.3e} is more than twice {allowed:.3e}"


def plain_torch(tensors: Tensors, mask: AttentionMask) -> Tensors:
    """[out, out, dq, dk, dv] of dense attention in the inputs' own dtype: the errors that rounding alone makes."""
    grad_out, *inputs = (x.nan_to_num(0.0) for x in tensors)
    q, k, v = (x.detach().clone().requires_grad_() for x in inputs)
    positions, group = torch.arange(q.shape[1], device=q.device), q.shape[2] // k.shape[2]
    keys, values = (x.repeat_interleave(group, 2).transpose(1, 2) for x in (k, v))
    allowed = torch.stack([whole(mask, head, positions, positions) for head in range(q.shape[2])])
    scores = (q.transpose(1, 2) @ keys.transpose(2, 3)) * SCALE
    weights = torch.softmax(scores.masked_fill(~allowed, -torch.inf), -1).nan_to_num(0.0).to(q.dtype)
    out = (torch.where(allowed, weights, 0.0) @ values).transpose(1, 2)
    return [out.detach(), out.detach(), *torch.autograd.grad(out, (q, k, v), grad_out)]


def plan_of(head_dim: int, backend: str, *, columns: int = 16, dtype: DType = "float16", world_size: int = 2) -> Plan:
    return make_plan(
        attention=AttentionSpec(
            model=ModelShape(layers=1, heads=4, kv_heads=2, head_dim=head_dim),
            seq_len_tokens=512,
            block_size=64,
            dtype=dtype,
            columns_capacity=columns,
        ),
        placement=striped(seq_len_tokens=512, world_size=world_size, granularity_tokens=64),
        forward=Gather(chunks=1),
        pattern=PatternSpec(source="trace"),
        kernels=KernelSpec.model_validate({"backend": backend}),
    )
