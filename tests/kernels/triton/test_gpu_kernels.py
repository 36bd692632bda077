"""The GPU backends on a real GPU: every shape and dtype they promise, against the float64 definition."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

import kernel_calls as calls
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
    Case(head_dim=64, toeplitz=False, columns=50, dtype=torch.float16),
    Case(head_dim=64, heads=(4, 4), batch=2),
    Case(documents=True, toeplitz=False, heads=(8, 2), head_dim=64, batch=2),
    Case(tokens=90, padding=0, heads=(2, 2)),
]


def promised(backend: str, case: Case) -> bool:
    """Whether the backend takes such a case; what it does not take must raise ValueError."""
    return backend != "flash4" or (case.block == 128 and case.dtype != torch.float32)


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


def run(tensors: list[torch.Tensor], mask: AttentionMask, scale: float, backend: str) -> list[torch.Tensor]:
    """[out, lse, dq, dk, dv] of a backend, differentiated through full_attention."""
    grad_out = tensors[0]
    q, k, v = (x.detach().clone().requires_grad_() for x in tensors[1:])
    out, lse = api.full_attention(q, k, v, mask, scale=scale, backend=backend)
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
def test_agrees_with_the_definition(case: Case, backend: str) -> None:
    tensors, mask = build(case)
    grad_out, q, k, v = tensors
    scale = case.head_dim**-0.5
    valid = slice(0, case.tokens)
    if not promised(backend, case):
        with pytest.raises(ValueError, match=r"flash4 backend"):
            run(tensors, mask, scale, backend)
        return
    out, lse, *grads = run(tensors, mask, scale, backend)
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


def test_repeats_bit_for_bit(backend: str) -> None:
    tensors, mask = build(Case(tokens=4096, padding=0, columns=300))
    promised_parts = slice(None) if backend == "triton" else slice(2)  # flash4 adds gradients up by atomics
    first = run(tensors, mask, 0.1, backend)
    for _ in range(9):
        again = run(tensors, mask, 0.1, backend)
        assert all(torch.equal(a, b) for a, b in zip(first[promised_parts], again[promised_parts], strict=True))


@pytest.fixture
def heads_end_to_end(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have flash4 lay query heads end to end, for which these problems are too small, where it is given scratch."""
    if backend != "flash4":
        pytest.skip("of the flash4 backend alone")
    monkeypatch.setattr("sparsering.kernels.flash4.launch.PROGRAMS_PER_MULTIPROCESSOR", 0)


@pytest.mark.usefixtures("heads_end_to_end")
@pytest.mark.parametrize("case", [case for case in CASES if promised("flash4", case)], ids=str)
def test_query_heads_end_to_end(case: Case, backend: str) -> None:
    """The same gradients but for rounding, and dK and dV that repeat bit for bit."""
    (grad_out, q, k, v), mask = build(case)
    tokens = torch.arange(q.shape[1], device="cuda")
    index = api.block_index(mask, tokens, tokens, backend=backend)
    out, lse = calls.block_forward(q, k, v, index, scale=0.1)
    delta = api.backend_of(backend).row_products(grad_out, out)

    def gradients(scratch: dict[str, object] | None, dtype: torch.dtype) -> list[torch.Tensor]:
        grads = [torch.full_like(x, torch.nan, dtype=kind) for x, kind in ((q, torch.float32), (k, dtype), (v, dtype))]
        into = dict(zip(("grad_q", "grad_k", "grad_v"), grads, strict=True))
        given = {"scale": 0.1, "backend": backend, "add_q": False, "add_kv": False, "scratch": scratch}
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
            partial = calls.block_forward(
                q[:, at], k[:, keys], v[:, keys], index, scale=scale, into=partial
            )
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
@pytest.mark.parametrize("tokens", [1000, 1024])
def test_flash4_with_query_tiles_as_a_batch(
    tokens: int, documents: bool, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The way of compute capability 10.0, on whatever is at hand: the same out as the other way."""
    if backend != "flash4":
        pytest.skip("of the flash4 backend alone")
    from sparsering.kernels.flash4 import launch as flash4_launch

    (_, q, k, v), mask = build(Case(tokens=tokens, documents=documents, batch=2))
    positions = torch.arange(q.shape[1], device="cuda")
    index = api.block_index(mask, positions, positions, backend=backend)
    monkeypatch.setattr(flash4_launch, "_by_tiles", lambda device: False)
    out, lse = calls.block_forward(q, k, v, index, scale=0.1)
    monkeypatch.setattr(flash4_launch, "_by_tiles", lambda device: True)
    by_tiles = calls.block_forward(q, k, v, index, scale=0.1)
    assert torch.equal(by_tiles[0], out) and torch.equal(by_tiles[1], lse)


@pytest.mark.parametrize("columns", [0, 70])
@pytest.mark.parametrize("groups", [1, 2, 8], ids=lambda n: f"{n} launches")
def test_flash4_in_head_groups(groups: int, columns: int, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables too large for one launch: the same out, and the same gradients but for rounding."""
    if backend != "flash4":
        pytest.skip("of the flash4 backend alone")
    from sparsering.kernels.flash4 import backend as flash4_backend
    from sparsering.kernels.flash4 import index as flash4_index

    case = Case(heads=(8, 2), columns=columns)
    (grad_out, q, k, v), mask = build(case)
    tokens = torch.arange(q.shape[1], device="cuda")
    index = flash4_backend.block_index(mask, tokens, tokens)
    per_head = max(index.table_bytes_of_a_head(transposed=t) for t in (False, True))
    monkeypatch.setattr(flash4_index, "LAUNCH_TABLE_BYTES", per_head * (8 // groups))
    given = None
    if columns:
        columns_task = flash4_backend.column_index(mask, tokens)
        column_k, column_v = flash4_backend.gather_columns(k, v, columns_task)
        given = column_k, column_v, columns_task
    out, lse = flash4_backend.block_forward(q, k, v, index, scale=0.1, out_dtype=q.dtype, columns=given)
    dq, dk, dv, of_columns = flash4_backend.full_gradients(grad_out, q, k, v, out, lse, index, scale=0.1, columns=given)
    if given is not None and of_columns is not None:
        flash4_backend.scatter_columns(*of_columns, given[2], grad_k=dk, grad_v=dv)
    assert (index.nbytes > 0) == (groups == 1)
    expected, expected_lse = reference_attention(q, k, v, mask, scale=0.1)
    assert torch.equal(lse == -torch.inf, expected_lse == -torch.inf)
    for ours, right in zip(
        (out, dq, dk, dv), (expected, *reference_gradients(grad_out, q, k, v, mask, scale=0.1)), strict=True
    ):
        assert torch.isfinite(ours).all()
        torch.testing.assert_close(ours.double(), right, atol=5e-2, rtol=2e-2)


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

    common = {"scale": 0.1, "backend": backend}
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
