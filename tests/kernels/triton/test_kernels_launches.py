"""The launches of one query shard as a chain: the first begins the accumulators, the last ends them in 16 bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import kernel_calls as calls
from sparsering.kernels import api, gathered
from sparsering.kernels.mask import AttentionMask

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("tests/runtime/attention/test_gpu_ring.py covers GPUs", allow_module_level=True)

BLOCK, HEADS, KV_HEADS, DIM, COLUMNS = 16, 4, 2, 16, 20
SCALE = 0.3
SHARDS = {"whole": [[0, 2, 4], [1, 3, 5]], "keys beyond the end": [[0, 1, 2], [6, 7]], "queries too": [[6, 7], [0, 1]]}
BACKENDS = ["triton", "blockwise"]


def problem(*, toeplitz: bool, tokens: int = 6 * BLOCK - 10) -> tuple[list[Tensor], AttentionMask]:
    """([grad_out, q, k, v] of 8 blocks, float16, mask of 6 blocks)."""
    generator = torch.Generator().manual_seed(5)
    active = torch.rand((HEADS, 6) if toeplitz else (HEADS, 6, 6), generator=generator) < 0.6
    columns = torch.stack([torch.randperm(tokens, generator=generator)[:COLUMNS].sort().values for _ in range(HEADS)])
    mask = AttentionMask(seq_len_tokens=tokens, block_size=BLOCK, active=active, columns=columns.int())
    shapes = (HEADS, HEADS, KV_HEADS, KV_HEADS)
    return [torch.randn(1, 8 * BLOCK, n, DIM, generator=generator).half() for n in shapes], mask


def positions(shard: list[int]) -> Tensor:
    return torch.cat([torch.arange(block * BLOCK, (block + 1) * BLOCK) for block in shard])


class Chain:
    """Forward and backward of the first shard's queries against both shards and the columns, launch by launch.

    plain: accumulators begun as zeros and cast at the end; else launches do both, and begin with NaN.
    """

    def __init__(self, *, toeplitz: bool, shards: list[list[int]], backend: str, plain: bool) -> None:
        (grad_out, q, k, v), mask = problem(toeplitz=toeplitz)
        self.plain, self.backend = plain, backend
        own, *others = [positions(shard) for shard in shards]
        self.q, self.grad_out = q[:, own], grad_out[:, own]
        keys = [own, *others]
        self.kv = [(k[:, at], v[:, at]) for at in keys]
        self.indexes = [api.block_index(mask, own, at, backend=backend) for at in keys]
        column_k, column_v = (gathered.gather_columns(x, mask, torch.arange(q.shape[1])) for x in (k, v))
        self.columns = column_k, column_v, api.column_index(mask, own, backend=backend)
        self.call: dict[str, Any] = {"scale": SCALE}

    def forward(self, *, columns_last: bool) -> tuple[Tensor, Tensor]:
        final: dict[str, Any] = {"final": not self.plain}
        partial = calls.block_forward(self.q, *self.kv[0], self.indexes[0], **self.call)
        if columns_last:
            partial = calls.block_forward(self.q, *self.kv[1], self.indexes[1], **self.call, into=partial)
            out, lse = calls.column_forward(self.q, *self.columns, **self.call, into=partial, **final)
        else:
            given = {"into": partial, "columns": self.columns, **final}
            out, lse = calls.block_forward(self.q, *self.kv[1], self.indexes[1], **self.call, **given)
        assert plain_or(self.plain, out.dtype, torch.float32, torch.float16)
        return out.half(), lse

    def accumulator(self, like: Tensor) -> Tensor:
        return torch.full(like.shape, 0.0 if self.plain else torch.nan)

    def backward(self, out: Tensor, lse: Tensor, *, columns_last: bool) -> list[Tensor]:
        """[dq in float16, dk, dv of every shard, dk, dv of the columns]."""
        delta = api.backend_of(self.backend).row_products(self.grad_out, out)
        inputs = lse, delta
        grad_q, final_q = self.accumulator(self.q), None if self.plain else torch.full_like(self.q, torch.nan)
        grads = [[self.accumulator(x) for x in pair] for pair in self.kv]
        grad_columns = torch.zeros(self.columns[0].shape), torch.zeros(self.columns[0].shape)
        last = {} if self.plain else {"final_q": final_q}
        for number, (pair, index, (grad_k, grad_v)) in enumerate(zip(self.kv, self.indexes, grads, strict=True)):
            given: dict[str, Any] = {"grad_q": grad_q, "grad_k": grad_k, "grad_v": grad_v}
            if not self.plain:
                given |= {"add_q": number > 0, "add_kv": False}
            if number and not columns_last:
                given |= {"columns": self.columns, "grad_columns": grad_columns, **last}
            calls.block_backward(self.grad_out, self.q, *pair, *inputs, index, **self.call, **given)
        if columns_last:
            into = {"grad_q": grad_q, "grad_column_k": grad_columns[0], "grad_column_v": grad_columns[1], **last}
            column_k, column_v, of_columns = self.columns
            calls.column_backward(self.grad_out, self.q, column_k, column_v, *inputs, of_columns, **self.call, **into)
        dq = grad_q.half() if final_q is None else final_q
        return [dq, *(x for pair in grads for x in pair), *grad_columns]


def plain_or(plain: bool, found: torch.dtype, then: torch.dtype, otherwise: torch.dtype) -> bool:
    return found == (then if plain else otherwise)


@pytest.mark.parametrize("columns_last", [False, True])
@pytest.mark.parametrize(("shards", "toeplitz"), [*((name, True) for name in SHARDS), ("whole", False)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_first_and_last_launch(backend: str, toeplitz: bool, shards: str, columns_last: bool) -> None:
    results = []
    for plain in (True, False):
        chain = Chain(toeplitz=toeplitz, shards=SHARDS[shards], backend=backend, plain=plain)
        out, lse = chain.forward(columns_last=columns_last)
        results.append([out, lse, *chain.backward(out, lse, columns_last=columns_last)])
    for plain, chained in zip(*results, strict=True):
        assert plain.dtype == chained.dtype and torch.equal(plain, chained)
    if shards == "whole":
        assert all(bool(x.any()) for x in results[0])


def test_a_final_gradient_must_lie_like_its_accumulator() -> None:
    chain = Chain(toeplitz=True, shards=SHARDS["whole"], backend="triton", plain=False)
    out, lse = chain.forward(columns_last=False)
    delta = api.backend_of("triton").row_products(chain.grad_out, out)
    accumulators = [torch.zeros(x.shape) for x in (chain.q, *chain.kv[0])]
    given = dict(zip(("grad_q", "grad_k", "grad_v"), accumulators, strict=True))
    across = torch.empty(chain.q.transpose(1, 2).shape, dtype=torch.float16).transpose(1, 2)
    with pytest.raises(ValueError, match=r"final_q: .* are not those of grad_q"):
        calls.block_backward(
            chain.grad_out, chain.q, *chain.kv[0], lse, delta, chain.indexes[0], **chain.call, **given, final_q=across
        )


@pytest.mark.parametrize(("shards", "toeplitz"), [*((name, True) for name in SHARDS), ("whole", False)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_key_gradients_of_one_launch_may_be_rounded(backend: str, toeplitz: bool, shards: str) -> None:
    chain = Chain(toeplitz=toeplitz, shards=SHARDS[shards], backend=backend, plain=False)
    out, lse = chain.forward(columns_last=False)
    delta = api.backend_of(backend).row_products(chain.grad_out, out)
    inputs = chain.grad_out, chain.q, *chain.kv[1], lse, delta, chain.indexes[1]
    found: dict[torch.dtype, list[Tensor]] = {}
    into: dict[str, Any] = {}
    for dtype in (torch.float32, torch.float16):
        grads = [torch.full(x.shape, torch.nan, dtype=dtype) for x in chain.kv[1]]
        into = {"grad_q": torch.zeros(chain.q.shape), "grad_k": grads[0], "grad_v": grads[1]}
        calls.block_backward(*inputs, **chain.call, **into, add_q=True, add_kv=False)
        found[dtype] = [into["grad_q"], *grads]
    for wide, rounded in zip(found[torch.float32], found[torch.float16], strict=True):
        assert torch.equal(wide.to(rounded.dtype), rounded)
    with pytest.raises(ValueError, match=r"grad_k: sums go on in torch\.float32, not torch\.float16"):
        calls.block_backward(*inputs, **chain.call, **into, add_q=True, add_kv=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("add", [True, False])
@pytest.mark.parametrize("count", [0, 1, 3])
def test_parts_are_added_up_in_order(backend: str, add: bool, count: int) -> None:
    generator = torch.Generator().manual_seed(count)
    parts = torch.randn(count, 2, 700, 2, 16, generator=generator)
    target = torch.randn(parts.shape[1:], generator=generator) if add else torch.full(parts.shape[1:], torch.nan)
    right = target.clone() if add else torch.zeros_like(target)
    for part in parts:
        right += part
    api.backend_of(backend).add_up(target, parts, add=add)
    assert torch.equal(target, right)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("add", [True, False])
def test_parts_are_added_to_some_heads(backend: str, add: bool) -> None:
    """Of a tensor of all heads; the others stay as they are."""
    generator = torch.Generator().manual_seed(0)
    parts, whole = torch.randn(3, 2, 700, 2, 16, generator=generator), torch.randn(2, 700, 5, 16, generator=generator)
    right = whole.clone()
    if not add:
        right[:, :, 1:3] = 0
    for part in parts:
        right[:, :, 1:3] += part
    api.backend_of(backend).add_up(whole[:, :, 1:3], parts, add=add)
    assert torch.equal(whole, right)


def test_adding_up_refuses_other_strides() -> None:
    from sparsering.kernels.triton import passes

    parts = torch.zeros(1, 2, 8, 4, 16)
    with pytest.raises(ValueError, match="target is no run of heads"):
        passes.add_up(torch.zeros(2, 4, 8, 16).transpose(1, 2), parts, add=True)
    with pytest.raises(ValueError, match="parts are not contiguous"):
        passes.add_up(torch.zeros(8, 2, 4, 16), parts.transpose(1, 2), add=True)


def test_long_tensors_fit_the_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU's grid has 2**31 - 1 programs along its first axis, and 65,535 along the others."""
    from sparsering.kernels.triton import passes

    grids: list[tuple[int, ...]] = []
    monkeypatch.setattr(passes, "run", lambda kernel, grid, *given, **constants: grids.append(grid))
    whole, parts = (torch.empty(*shape, device="meta") for shape in ((1, 1 << 17, 32, 128), (3, 1, 1 << 17, 32, 128)))
    passes.add_up(whole, parts, add=True)
    passes.add_rows(whole, whole, whole, add=False)
    passes.add_rows(whole[:, :, :16], whole[:, :, :16], whole[:, :, :16], add=True)
    passes.row_products(whole, whole)
    assert len(grids) == 4
    for grid in grids:
        assert 1 << 12 <= grid[0] < 1 << 31 and all(size <= 65535 for size in grid[1:])


def test_rows_are_added_whatever_order_they_lie_in() -> None:
    from sparsering.kernels.triton import passes

    generator = torch.Generator().manual_seed(0)
    part = torch.randn(2, 4, 60, 16, generator=generator).half().transpose(1, 2)[:, :45]
    prior = torch.randn(2, 50, 4, 16, generator=generator)
    target = torch.full((2, 4, 50, 16), torch.nan).transpose(1, 2)
    for add in (False, True):
        passes.add_rows(part, prior, target, add=add)
        right = prior.clone() if add else torch.zeros_like(prior)
        right[:, :45] += part
        assert torch.equal(target, right)
    across = torch.full((2, 50, 16, 4), torch.nan).transpose(2, 3)  # the elements of a row are not side by side
    passes.add_rows(part, prior, across, add=True)
    assert torch.equal(across, target)


def test_a_sum_in_16_bits_is_rounded_once() -> None:
    from sparsering.kernels.triton import passes

    generator = torch.Generator().manual_seed(0)
    prior = torch.randn(1, 40, 4, 16, generator=generator).half()
    part = torch.randn(1, 40, 4, 16, generator=generator) * 1e-3
    right = (prior.float() + part).half()
    for heads in (slice(None), slice(1, 3)):  # in one piece, and not
        target = prior.clone()[:, :, heads]
        passes.add_rows(part[:, :, heads], target, target, add=True)
        assert torch.equal(target, right[:, :, heads])
    assert not torch.equal(right, prior + part.half())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_row_products(backend: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(2, 45, 16, 3, generator=generator).to(dtype).transpose(2, 3)  # rows of D are not in one piece
    right = torch.randn(2, 45, 3, 16, generator=generator).to(dtype)
    found = api.backend_of(backend).row_products(left, right)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(
        found.double(), (left.double() * right.double()).sum(-1).transpose(1, 2), atol=1e-5, rtol=1e-5
    )
