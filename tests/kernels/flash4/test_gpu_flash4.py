"""The flash4 backend alone, on a real GPU: how it cuts and lays its launches changes no result."""

from __future__ import annotations

import pytest
import torch

import kernel_calls as calls
from gpu_kernel_cases import CASES, Case, build, promised
from sparsering.kernels import api
from sparsering.kernels.mask import AttentionMask
from sparsering.kernels.plain.reference import reference_attention, reference_gradients

pytest.importorskip("triton")
from sparsering.kernels.flash4 import index as flash4_index
from sparsering.kernels.flash4 import launch as flash4_launch

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def where_it_runs() -> None:
    """Skip where the wheels are not installed, or the GPU is none of theirs."""
    mask = AttentionMask(seq_len_tokens=128, block_size=128, active=torch.ones(1, 1, dtype=torch.bool).cuda())
    try:
        api.block_index(mask, torch.arange(128), torch.arange(128), backend="flash4")
    except ValueError as error:
        pytest.skip(str(error))


@pytest.fixture
def heads_end_to_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have flash4 lay query heads end to end, for which these problems are too small, where it is given scratch."""
    monkeypatch.setattr("sparsering.kernels.flash4.launch.PROGRAMS_PER_MULTIPROCESSOR", 0)


@pytest.mark.usefixtures("heads_end_to_end")
@pytest.mark.parametrize("case", [case for case in CASES if promised("flash4", case)], ids=str)
def test_query_heads_end_to_end(case: Case) -> None:
    """The same gradients but for rounding, and dK and dV that repeat bit for bit."""
    (grad_out, q, k, v), mask = build(case)
    tokens = torch.arange(q.shape[1], device="cuda")
    index = api.block_index(mask, tokens, tokens, backend="flash4")
    out, lse = calls.block_forward(q, k, v, index, scale=0.1)
    delta = api.backend_of("flash4").row_products(grad_out, out)

    def gradients(scratch: dict[str, object] | None, dtype: torch.dtype) -> list[torch.Tensor]:
        grads = [torch.full_like(x, torch.nan, dtype=kind) for x, kind in ((q, torch.float32), (k, dtype), (v, dtype))]
        into = dict(zip(("grad_q", "grad_k", "grad_v"), grads, strict=True))
        given = {"scale": 0.1, "add_q": False, "add_kv": False, "scratch": scratch}
        calls.block_backward(grad_out, q, k, v, lse, delta, index, **into, **given)
        return grads

    apart = gradients(None, torch.float32)
    scratch: dict[str, object] = {}
    together = gradients(scratch, torch.float32)
    assert bool(scratch) == (case.heads[0] > case.heads[1])
    for found, right in zip(together, apart, strict=True):
        assert torch.isfinite(found).all()
        torch.testing.assert_close(found, right, atol=1e-2, rtol=1e-2)
    for _ in range(3):
        again = gradients(scratch, case.dtype)
        assert all(torch.equal(a, b.to(case.dtype)) for a, b in zip(again[1:], together[1:], strict=True))


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("tokens", [1000, 1024])
def test_flash4_with_query_tiles_as_a_batch(tokens: int, documents: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The way of compute capability 10.0, on whatever is at hand: the same out as the other way."""
    (_, q, k, v), mask = build(Case(tokens=tokens, documents=documents, batch=2))
    positions = torch.arange(q.shape[1], device="cuda")
    index = api.block_index(mask, positions, positions, backend="flash4")
    monkeypatch.setattr(flash4_launch, "_by_tiles", lambda device: False)
    out, lse = calls.block_forward(q, k, v, index, scale=0.1)
    monkeypatch.setattr(flash4_launch, "_by_tiles", lambda device: True)
    by_tiles = calls.block_forward(q, k, v, index, scale=0.1)
    assert torch.equal(by_tiles[0], out) and torch.equal(by_tiles[1], lse)


@pytest.mark.parametrize("columns", [0, 70])
@pytest.mark.parametrize("groups", [1, 2, 8], ids=lambda n: f"{n} launches")
def test_flash4_in_head_groups(groups: int, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables too large for one launch: the same out, and the same gradients but for rounding."""
    case = Case(heads=(8, 2), columns=columns)
    (grad_out, q, k, v), mask = build(case)
    tokens = torch.arange(q.shape[1], device="cuda")
    whole = api.WholeAttention.of(mask, len(tokens), device=q.device, backend="flash4")
    index, queries = whole.block.data, api.Queries(q=q, scale=0.1)
    per_head = max(index.table_bytes_of_a_head(transposed=t) for t in (False, True))
    monkeypatch.setattr(flash4_index, "LAUNCH_TABLE_BYTES", per_head * (8 // groups))
    out, lse = whole.forward(queries, k, v)
    dq, dk, dv = whole.backward(queries, k, v, (out, lse), grad_out)
    assert (index.nbytes > 0) == (groups == 1)
    expected, expected_lse = reference_attention(q, k, v, mask, scale=0.1)
    assert torch.equal(lse == -torch.inf, expected_lse == -torch.inf)
    for ours, right in zip(
        (out, dq, dk, dv), (expected, *reference_gradients(grad_out, q, k, v, mask, scale=0.1)), strict=True
    ):
        assert torch.isfinite(ours).all()
        torch.testing.assert_close(ours.double(), right, atol=5e-2, rtol=2e-2)
