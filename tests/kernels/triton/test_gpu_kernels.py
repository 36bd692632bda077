"""The GPU backends on a real GPU: every shape and dtype they promise, against the float64 definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import kernel_calls as calls
from gpu_kernel_cases import CASES, Case, build, plain_torch, promised, run
from sparsering.kernels import api, gathered
from sparsering.kernels.mask import AttentionMask, whole
from sparsering.kernels.plain.reference import reference_attention, reference_gradients

pytestmark = pytest.mark.gpu


@pytest.fixture(params=["triton", "flash4"])
def backend(request: pytest.FixtureRequest) -> str:
    """Each backend for GPUs; flash4 where its wheels are installed and the GPU is one of its own."""
    if request.param == "flash4":
        mask = AttentionMask(seq_len_tokens=128, block_size=128, active=torch.ones(1, 1, dtype=torch.bool).cuda())
        try:
            api.block_index(mask, torch.arange(128), torch.arange(128), backend="flash4")
        except ValueError as error:
            pytest.skip(str(error))
    return request.param


@pytest.mark.parametrize("case", CASES, ids=str)
def test_agrees_with_the_definition(case: Case, backend: str) -> None:
    tensors, mask = build(case)
    q, scale = tensors[1], case.head_dim**-0.5
    valid = slice(0, case.tokens)
    form = {"softcap": case.softcap, "sinks": case.logits()}
    if not promised(backend, case):
        with pytest.raises(ValueError, match=r"flash4 backend"):
            run(tensors, mask, scale, backend, **form)
        return
    out, lse, *grads = run(tensors, mask, scale, backend, **form)
    expected_out, expected_lse, *expected = run([x.double() for x in tensors], mask, scale, "reference", **form)
    expected.insert(0, expected_out)
    dead = expected_lse == -torch.inf
    assert torch.equal(lse == -torch.inf, dead)
    assert torch.all(out.transpose(1, 2)[dead] == 0)
    tolerance = 1e-5 if q.dtype == torch.float32 else 2e-3
    torch.testing.assert_close(lse[~dead].double(), expected_lse[~dead], atol=tolerance, rtol=0)
    plain = plain_torch(tensors, mask, scale, **form)
    for name, ours, theirs, right in zip(("out", "dq", "dk", "dv"), (out, *grads), plain, expected, strict=True):
        assert torch.isfinite(ours).all(), name
        error = (ours.double() - right)[:, valid].abs().max()
        # Twice in 16 bits; in float32 the order of additions weighs as much as rounding.
        allowed = (4 if q.dtype == torch.float32 else 2) * (theirs.double() - right)[:, valid].abs().max()
        assert error <= allowed, f"{name}: error {error:.3e}, plain torch's allows {allowed:.3e}"


def test_repeats_bit_for_bit(backend: str) -> None:
    tensors, mask = build(Case(tokens=4096, padding=0, columns=300))
    promised_parts = slice(None) if backend == "triton" else slice(2)  # flash4 adds gradients up by atomics
    first = run(tensors, mask, 0.1, backend)
    for _ in range(9):
        again = run(tensors, mask, 0.1, backend)
        assert all(torch.equal(a, b) for a, b in zip(first[promised_parts], again[promised_parts], strict=True))


@pytest.mark.parametrize("world", [2, 3])
def test_striped_shards_add_up(world: int, backend: str) -> None:
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
            index = api.block_index(mask, at, keys, backend=backend)
            partial = calls.block_forward(q[:, at], k[:, keys], v[:, keys], index, scale=scale, into=partial)
        columns = api.column_index(mask, at, backend=backend)
        column_k, column_v = (gathered.gather_columns(x, mask, everything) for x in (k, v))
        partial = calls.column_forward(q[:, at], column_k, column_v, columns, scale=scale, into=partial)
        out[:, at], lse[:, :, at] = partial
    expected, expected_lse = reference_attention(q, k, v, mask, scale=scale)
    alive = expected_lse > -torch.inf
    torch.testing.assert_close(lse[alive].double(), expected_lse[alive], atol=2e-3, rtol=0)
    torch.testing.assert_close(out.double(), expected, atol=2e-2, rtol=2e-2)
    assert torch.isfinite(out).all()
    delta = (grad_out.nan_to_num().float() * out).sum(-1).transpose(1, 2).contiguous()
    grads = [torch.zeros(x.shape, device="cuda") for x in (q, k, v)]
    for at in shards:
        for keys in shards:
            index = api.block_index(mask, at, keys, backend=backend)
            parts = [
                torch.zeros(1, len(n), x.shape[2], x.shape[3], device="cuda")
                for n, x in ((at, q), (keys, k), (keys, v))
            ]
            for _ in range(2):  # twice, halved: it adds
                calls.block_backward(
                    grad_out[:, at],
                    q[:, at],
                    k[:, keys],
                    v[:, keys],
                    lse[:, :, at],
                    delta[:, :, at],
                    index,
                    scale=scale,
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
    calls.block_backward(
        grad_out,
        q,
        k,
        v,
        lse,
        delta,
        whole_index,
        scale=scale,
        grad_q=blockwise[0],
        grad_k=blockwise[1],
        grad_v=blockwise[2],
    )
    for ours, right in zip(grads, blockwise, strict=True):
        torch.testing.assert_close(ours[:, : case.tokens], right[:, : case.tokens], atol=5e-2, rtol=2e-2)


@pytest.mark.parametrize("documents", [False, True])
def test_gathered_and_odd_layouts(documents: bool, backend: str) -> None:
    """Several key shards one behind another, views with foreign strides, an accumulator merged three times."""
    case = Case(tokens=1500, padding=36, heads=(4, 2), documents=documents)
    (grad_out, q, k, v), mask = build(case)
    grad_out, q, k, v = (x.nan_to_num() for x in (grad_out, q, k, v))
    blocks = torch.arange(q.shape[1], device="cuda").split(case.block)
    shards = [torch.cat(blocks[rank::3]) for rank in range(3)]
    at, keys = shards[1], torch.cat([shards[2], shards[0]])

    def odd(x: torch.Tensor) -> torch.Tensor:
        return x.transpose(1, 2).contiguous().transpose(1, 2)

    common: dict[str, Any] = {"scale": 0.1}
    partial = None
    for where in (keys, at):
        index = api.block_index(mask, at, where, backend=backend)
        partial = calls.block_forward(odd(q[:, at]), odd(k[:, where]), v[:, where], index, **common, into=partial)
    assert partial is not None
    out, lse = partial
    expected, expected_lse = reference_attention(q, k, v, mask, scale=0.1)
    alive = expected_lse[:, :, at] > -torch.inf
    torch.testing.assert_close(lse[alive].double(), expected_lse[:, :, at][alive], atol=2e-3, rtol=0)
    torch.testing.assert_close(out.double(), expected[:, at], atol=2e-2, rtol=2e-2)
    delta = (grad_out[:, at].float() * out).sum(-1).transpose(1, 2)
    grad_q = torch.zeros(1, len(at), 4, 128, device="cuda")
    for where in (keys, at):
        grad_k, grad_v = torch.zeros(2, 1, len(where), 2, 128, device="cuda")
        index = api.block_index(mask, at, where, backend=backend)
        calls.block_backward(
            odd(grad_out[:, at]),
            q[:, at],
            k[:, where],
            odd(v[:, where]),
            lse,
            delta,
            index,
            **common,
            grad_q=grad_q,
            grad_k=grad_k,
            grad_v=grad_v,
        )
        assert torch.isfinite(grad_k).all() and torch.isfinite(grad_v).all()
    right = reference_gradients(grad_out, q, k, v, mask, scale=0.1)[0][:, at]
    torch.testing.assert_close(grad_q.double(), right, atol=5e-2, rtol=2e-2)
