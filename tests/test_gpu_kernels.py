"""The Triton kernels on a real GPU: every shape and dtype they promise, against the float64 definition."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from sparsering.kernels import api
from sparsering.kernels.mask import AttentionMask, whole
from sparsering.kernels.reference import reference_attention, reference_gradients

pytestmark = pytest.mark.gpu


@dataclass(frozen=True, kw_only=True)
class Case:
    """One problem; its name is its repr."""

    tokens: int = 1000
    padding: int = 24
    heads: tuple[int, int] = (16, 2)
    head_dim: int = 128
    block: int = 128
    toeplitz: bool = True
    columns: int = 0
    documents: bool = False
    dtype: torch.dtype = torch.bfloat16
    batch: int = 1

    def __str__(self) -> str:
        parts = [
            f"{self.tokens}+{self.padding}",
            f"{self.heads[0]}:{self.heads[1]}",
            f"d{self.head_dim}",
            f"b{self.block}",
            "toeplitz" if self.toeplitz else "csr",
            f"c{self.columns}",
            str(self.dtype).removeprefix("torch."),
        ]
        return "-".join(parts + (["documents"] if self.documents else []) + ([f"batch{self.batch}"] * (self.batch > 1)))


CASES = [
    Case(),
    Case(head_dim=64, block=64, dtype=torch.float16),
    Case(head_dim=64, heads=(8, 8), toeplitz=False, columns=100),
    Case(heads=(32, 8), block=64, columns=200, tokens=2048, padding=0),
    Case(heads=(4, 4), batch=2, columns=64, dtype=torch.float16, tokens=777, padding=0),
    Case(documents=True, columns=70, heads=(8, 2)),
    Case(documents=True, toeplitz=False, block=64, heads=(8, 2), padding=300),
    Case(dtype=torch.float32, heads=(4, 2), columns=33),
    Case(tokens=130, padding=126, heads=(2, 1), columns=130),
]


def build(case: Case, seed: int = 0) -> tuple[list[torch.Tensor], AttentionMask]:
    """([grad_out, q, k, v], mask) on the GPU: random, head 0 without blocks, NaN in the padding."""
    generator = torch.Generator().manual_seed(seed)
    heads, kv_heads = case.heads
    blocks = -(-case.tokens // case.block)
    shape = (heads, blocks) if case.toeplitz else (heads, blocks, blocks)
    active = torch.rand(shape, generator=generator) < 0.4
    active[0] = False
    columns = documents = None
    if case.columns:
        columns = torch.stack(
            [torch.sort(torch.randperm(case.tokens, generator=generator)[: case.columns]).values for _ in range(heads)]
        ).int()
        columns[-1, case.columns // 2 :] = case.tokens
    if case.documents:
        documents = (torch.arange(case.tokens + case.padding) // 300).int()
    mask = AttentionMask(
        seq_len_tokens=case.tokens, block_size=case.block, active=active, columns=columns, documents=documents
    )
    tensors = []
    for count in (heads, heads, kv_heads, kv_heads):
        x = torch.randn(case.batch, case.tokens + case.padding, count, case.head_dim, generator=generator)
        x[:, case.tokens :] = float("nan")
        tensors.append(x.to("cuda", case.dtype))
    return tensors, mask.to("cuda")


def run(tensors: list[torch.Tensor], mask: AttentionMask, scale: float) -> list[torch.Tensor]:
    """[out, lse, dq, dk, dv] of the triton backend, differentiated through full_attention."""
    grad_out = tensors[0]
    q, k, v = (x.detach().clone().requires_grad_() for x in tensors[1:])
    out, lse = api.full_attention(q, k, v, mask, scale=scale, backend="triton")
    return [out.detach(), lse, *torch.autograd.grad(out, (q, k, v), grad_out)]


def plain_torch(tensors: list[torch.Tensor], mask: AttentionMask, scale: float) -> list[torch.Tensor]:
    """The same in the inputs' own dtype with torch's matmul and softmax: the error that rounding alone makes."""
    grad_out, q, k, v = (x.nan_to_num(0.0) for x in tensors)
    q, k, v = (x.detach().clone().requires_grad_() for x in (q, k, v))
    positions = torch.arange(q.shape[1], device=q.device)
    group = q.shape[2] // k.shape[2]
    keys, values = (x.repeat_interleave(group, 2).transpose(1, 2) for x in (k, v))
    allowed = torch.stack([whole(mask, head, positions, positions) for head in range(q.shape[2])])
    scores = (q.transpose(1, 2) @ keys.transpose(2, 3)) * scale
    weights = torch.softmax(scores.masked_fill(~allowed, -torch.inf), -1).nan_to_num(0.0).to(q.dtype)
    weights = torch.where(allowed, weights, 0.0)
    out = (weights @ values).transpose(1, 2)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), grad_out)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_agrees_with_the_definition(case: Case) -> None:
    tensors, mask = build(case)
    grad_out, q, k, v = tensors
    scale = case.head_dim**-0.5
    valid = slice(0, case.tokens)
    out, lse, *grads = run(tensors, mask, scale)
    expected_out, expected_lse = reference_attention(q, k, v, mask, scale=scale)
    expected = [expected_out, *reference_gradients(grad_out, q, k, v, mask, scale=scale)]
    dead = expected_lse == -torch.inf
    assert torch.equal(lse == -torch.inf, dead)
    assert torch.all(out.transpose(1, 2)[dead] == 0)
    tolerance = 1e-5 if q.dtype == torch.float32 else 2e-3
    torch.testing.assert_close(lse[~dead].double(), expected_lse[~dead], atol=tolerance, rtol=0)
    plain = plain_torch(tensors, mask, scale)
    for name, ours, theirs, right in zip(("out", "dq", "dk", "dv"), (out, *grads), plain, expected, strict=True):
        assert torch.isfinite(ours).all(), name
        error = (ours.double() - right)[:, valid].abs().max()
        # Twice in 16 bits; in float32 the order of additions weighs as much as rounding.
        allowed = (4 if q.dtype == torch.float32 else 2) * (theirs.double() - right)[:, valid].abs().max()
        assert error <= allowed, f"{name}: error {error:.3e}, plain torch's allows {allowed:.3e}"


def test_repeats_bit_for_bit() -> None:
    tensors, mask = build(Case(tokens=4096, padding=0, columns=300))
    first = run(tensors, mask, 0.1)
    for _ in range(9):
        again = run(tensors, mask, 0.1)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("world", [2, 3])
def test_striped_shards_add_up(world: int) -> None:
    """Partials over block-striped key shards, merged in place, and gradients added task by task."""
    case = Case(tokens=1500, padding=36, heads=(4, 2), columns=50)
    tensors, mask = build(case)
    grad_out, q, k, v = tensors
    scale = case.head_dim**-0.5
    blocks = torch.arange(q.shape[1], device="cuda").split(case.block)
    shards = [torch.cat(blocks[rank::world]) for rank in range(world)]
    out = torch.full_like(q, float("nan"), dtype=torch.float32)
    lse = torch.full((1, 4, q.shape[1]), float("nan"), device="cuda")
    everything = torch.arange(q.shape[1], device="cuda")
    for at in shards:
        partial = None
        for keys in shards:
            index = api.block_index(mask, at, keys, backend="triton")
            partial = api.block_forward(
                q[:, at], k[:, keys], v[:, keys], index, scale=scale, backend="triton", into=partial
            )
        columns = api.column_index(mask, at, backend="triton")
        column_k, column_v = (api.gather_columns(x, mask, everything) for x in (k, v))
        partial = api.column_forward(q[:, at], column_k, column_v, columns, scale=scale, backend="triton", into=partial)
        out[:, at], lse[:, :, at] = partial
    expected, expected_lse = reference_attention(q, k, v, mask, scale=scale)
    alive = expected_lse > -torch.inf
    torch.testing.assert_close(lse[alive].double(), expected_lse[alive], atol=2e-3, rtol=0)
    torch.testing.assert_close(out.double(), expected, atol=2e-2, rtol=2e-2)
    delta = (grad_out.nan_to_num().float() * out).sum(-1).transpose(1, 2).contiguous()
    grads = [torch.zeros(x.shape, device="cuda") for x in (q, k, v)]
    for at in shards:
        for keys in shards:
            index = api.block_index(mask, at, keys, backend="triton")
            parts = [
                torch.zeros(1, len(n), x.shape[2], x.shape[3], device="cuda")
                for n, x in ((at, q), (keys, k), (keys, v))
            ]
            for _ in range(2):  # twice, halved: it adds
                api.block_backward(
                    grad_out[:, at],
                    q[:, at],
                    k[:, keys],
                    v[:, keys],
                    lse[:, :, at],
                    delta[:, :, at],
                    index,
                    scale=scale,
                    backend="triton",
                    grad_q=parts[0],
                    grad_k=parts[1],
                    grad_v=parts[2],
                )
            for grad, where, part in zip(grads, (at, keys, keys), parts, strict=True):
                grad[:, where] += part / 2
    no_columns = AttentionMask(seq_len_tokens=mask.seq_len_tokens, block_size=mask.block_size, active=mask.active)
    for head in range(4):
        assert not whole(no_columns, head, everything, everything)[case.tokens :].any()
    blockwise = [torch.zeros_like(g) for g in grads]
    whole_index = api.block_index(mask, everything, everything, backend="blockwise")
    grad_out, q, k, v = (x.nan_to_num().float() for x in (grad_out, q, k, v))
    api.block_backward(
        grad_out,
        q,
        k,
        v,
        lse,
        delta,
        whole_index,
        scale=scale,
        backend="blockwise",
        grad_q=blockwise[0],
        grad_k=blockwise[1],
        grad_v=blockwise[2],
    )
    for ours, right in zip(grads, blockwise, strict=True):
        torch.testing.assert_close(ours[:, : case.tokens], right[:, : case.tokens], atol=5e-2, rtol=2e-2)
