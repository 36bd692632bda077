"""The Triton kernels in Triton's interpreter (small, float64) against the float64 definition."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

import kernel_calls as calls
from sparsering.kernels import api, gathered
from sparsering.kernels.mask import AttentionMask
from sparsering.kernels.plain.reference import reference_attention, reference_gradients

pytest.importorskip("triton")
from sparsering.kernels.triton import gradients

if torch.cuda.is_available():
    pytest.skip(
        "the interpreter is for machines without a GPU; tests/kernels/triton/test_gpu_kernels.py covers this one",
        allow_module_level=True,
    )

TOLERANCE = 1e-10
SCALE = 0.3


def problem(
    *,
    tokens: int,
    padding: int,
    block: int,
    toeplitz: bool,
    heads: tuple[int, int] = (4, 2),
    columns: int = 0,
    documents: bool = False,
    batch: int = 1,
    dtype: torch.dtype = torch.float64,
    head_dim: int = 16,
    seed: int = 0,
) -> tuple[list[torch.Tensor], AttentionMask]:
    """([grad_out, q, k, v], mask); head 0 has no active block, padding holds NaN."""
    generator = torch.Generator().manual_seed(seed)
    count, kv_heads = heads
    blocks = -(-tokens // block)
    active = torch.rand((count, blocks) if toeplitz else (count, blocks, blocks), generator=generator) < 0.5
    active[0] = False
    chosen = None
    if columns:
        chosen = torch.stack(
            [torch.sort(torch.randperm(tokens, generator=generator)[:columns]).values for _ in range(count)]
        ).int()
        chosen[-1, columns // 2 :] = tokens
    starts = (torch.arange(tokens + padding) // (tokens // 3)).int() if documents else None
    mask = AttentionMask(seq_len_tokens=tokens, block_size=block, active=active, columns=chosen, documents=starts)
    tensors = [
        torch.randn(batch, tokens + padding, n, head_dim, dtype=dtype, generator=generator)
        for n in (count, count, kv_heads, kv_heads)
    ]
    for x in tensors:
        x[:, tokens:] = float("nan")
    return tensors, mask


def run(tensors: list[torch.Tensor], mask: AttentionMask) -> list[torch.Tensor]:
    grad_out = tensors[0]
    q, k, v = (x.detach().clone().requires_grad_() for x in tensors[1:])
    out, lse = api.full_attention(q, k, v, mask, scale=SCALE, backend="triton")
    return [out.detach(), lse, *torch.autograd.grad(out, (q, k, v), grad_out)]


def expected(tensors: list[torch.Tensor], mask: AttentionMask) -> list[torch.Tensor]:
    grad_out, q, k, v = tensors
    return [
        *reference_attention(q, k, v, mask, scale=SCALE),
        *reference_gradients(grad_out, q, k, v, mask, scale=SCALE),
    ]


def assert_same(ours: list[torch.Tensor], right: list[torch.Tensor], valid: int, tolerance: float = TOLERANCE) -> None:
    for name, a, b in zip(("out", "lse", "dq", "dk", "dv"), ours, right, strict=True):
        if name == "lse":
            torch.testing.assert_close(a.double(), b, atol=tolerance, rtol=0, msg=name)
        else:
            assert torch.isfinite(a).all(), f"{name} holds NaN or inf"
            torch.testing.assert_close(a[:, :valid].double(), b[:, :valid], atol=tolerance, rtol=0, msg=name)


CASES = {
    "toeplitz, ragged, padded": {"tokens": 150, "padding": 10, "block": 32, "toeplitz": True},
    "block mask, columns": {"tokens": 128, "padding": 0, "block": 32, "toeplitz": False, "columns": 40},
    "toeplitz, columns, documents": {
        "tokens": 100,
        "padding": 28,
        "block": 32,
        "toeplitz": True,
        "columns": 30,
        "documents": True,
    },
    "blocks of 128, MHA": {"tokens": 200, "padding": 0, "block": 128, "toeplitz": True, "heads": (2, 2), "columns": 70},
    "batch of 2, 4:1": {"tokens": 64, "padding": 16, "block": 16, "toeplitz": False, "batch": 2, "heads": (4, 1)},
}


@pytest.mark.parametrize("name", CASES)
def test_agrees_with_the_definition(name: str) -> None:
    tensors, mask = problem(**CASES[name])
    assert_same(run(tensors, mask), expected(tensors, mask), mask.seq_len_tokens)


@pytest.mark.parametrize("toeplitz", [True, False])
def test_columns_where_every_own_block_is_active(toeplitz: bool) -> None:
    """As after every selector: the loop over columns of own blocks is left out."""
    tensors, mask = problem(tokens=150, padding=10, block=32, toeplitz=toeplitz, columns=40)
    assert not mask.own_blocks
    active = mask.active.clone()
    own = active[:, 0] if toeplitz else active.diagonal(dim1=1, dim2=2)
    own[:] = True
    mask = dataclasses.replace(mask, active=active, own_blocks=None)
    assert mask.own_blocks
    assert_same(run(tensors, mask), expected(tensors, mask), 150)
    active = active.clone()
    (active[:, 0] if toeplitz else active[:, 2, 2])[:] = False
    assert not dataclasses.replace(mask, active=active).own_blocks, "what was true of the mask it was made from"


@pytest.mark.parametrize("padding", [0, 17])
def test_key_tiles_that_all_attend_are_split_over_heads(padding: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradients, "SPLIT_ROWS", 2)
    tensors, mask = problem(tokens=150, padding=padding, block=32, toeplitz=False, heads=(4, 2))
    mask.active[:, :, 1] = True  # a sink that is not the first block
    index = api.block_index(mask, *[torch.arange(150 + padding)] * 2, backend="triton")
    assert int(index.data.keys.order[0]) == 1
    assert_same(run(tensors, mask), expected(tensors, mask), 150)


def test_float32_inputs_accumulate_in_float32() -> None:
    tensors, mask = problem(tokens=70, padding=0, block=32, toeplitz=True, columns=9, dtype=torch.float32, heads=(2, 1))
    ours = run(tensors, mask)
    assert ours[1].dtype == torch.float32
    assert_same(ours, expected(tensors, mask), 70, tolerance=1e-5)


def test_golden_case(golden: Path) -> None:
    case = np.load(golden / "attention-sparse-gqa.npz")
    q, k, v, grad_out = (torch.from_numpy(case[n])[None] for n in ("q", "k", "v", "grad_out"))
    heads, block, tokens = q.shape[2], int(case["block_size"]), q.shape[1]
    active = torch.zeros(heads, -(-tokens // block), dtype=torch.bool)
    offsets, column_offsets = case["diagonals_offsets"], case["columns_offsets"]
    widest = int(np.diff(column_offsets).max())
    columns = torch.full((heads, widest), tokens, dtype=torch.int32)
    for head in range(heads):
        active[head, case["diagonals"][offsets[head] : offsets[head + 1]]] = True
        mine = np.sort(case["columns"][column_offsets[head] : column_offsets[head + 1]])
        columns[head, : len(mine)] = torch.from_numpy(mine).int()
    mask = AttentionMask(seq_len_tokens=tokens, block_size=block, active=active, columns=columns)
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    out, lse = api.full_attention(q, k, v, mask, scale=float(case["scale"]), backend="triton")
    grads = torch.autograd.grad(out, (q, k, v), grad_out)
    for ours, name in zip([out.detach(), lse, *grads], ("out", "lse", "dq", "dk", "dv"), strict=True):
        np.testing.assert_allclose(ours[0].numpy(), case[name], atol=1e-8, err_msg=name)


@pytest.mark.parametrize(
    ("name", "toeplitz", "shards"),
    [
        ("striped", True, [[0, 2, 4], [1, 3, 5]]),
        ("zigzag", True, [[0, 1, 4, 5], [2, 3]]),
        ("striped block mask", False, [[0, 2, 4], [1, 3, 5]]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_shards_add_up(name: str, toeplitz: bool, shards: list[list[int]]) -> None:
    """Every (query shard, key shard) task, merged in place, gradients added into shared accumulators."""
    block = 32
    (grad_out, q, k, v), mask = problem(tokens=6 * block - 20, padding=20, block=block, toeplitz=toeplitz, columns=20)
    at = [torch.cat([torch.arange(b * block, (b + 1) * block) for b in shard]) for shard in shards]
    everything = torch.arange(q.shape[1])
    column_k, column_v = (gathered.gather_columns(x, mask, everything) for x in (k, v))
    partials = []
    for queries in at:
        partial = None
        for keys in at:
            index = api.block_index(mask, queries, keys, backend="triton")
            partial = calls.block_forward(q[:, queries], k[:, keys], v[:, keys], index, scale=SCALE, into=partial)
        index = api.column_index(mask, queries, backend="triton")
        partials.append(calls.column_forward(q[:, queries], column_k, column_v, index, scale=SCALE, into=partial))
    grads = [torch.zeros_like(x) for x in (q, k, v)]
    grad_columns = [torch.zeros_like(x) for x in (column_k, column_v)]
    for queries, (out, lse) in zip(at, partials, strict=True):
        delta = (grad_out[:, queries] * out).sum(-1).transpose(1, 2)
        grad_q = torch.zeros_like(q[:, queries])
        for keys in at:
            index = api.block_index(mask, queries, keys, backend="triton")
            parts = [torch.zeros_like(x[:, keys]) for x in (k, v)]
            calls.block_backward(
                grad_out[:, queries],
                q[:, queries],
                k[:, keys],
                v[:, keys],
                lse,
                delta,
                index,
                scale=SCALE,
                grad_q=grad_q,
                grad_k=parts[0],
                grad_v=parts[1],
            )
            grads[1][:, keys] += parts[0]
            grads[2][:, keys] += parts[1]
        index = api.column_index(mask, queries, backend="triton")
        calls.column_backward(
            grad_out[:, queries],
            q[:, queries],
            column_k,
            column_v,
            lse,
            delta,
            index,
            scale=SCALE,
            grad_q=grad_q,
            grad_column_k=grad_columns[0],
            grad_column_v=grad_columns[1],
        )
        grads[0][:, queries] = grad_q
    for columns, grad in zip(grad_columns, grads[1:], strict=True):
        gathered.scatter_columns(columns, mask, everything, grad=grad)
    whole = [torch.empty_like(q), torch.empty(1, 4, q.shape[1], dtype=q.dtype)]
    for queries, (out, lse) in zip(at, partials, strict=True):
        whole[0][:, queries], whole[1][:, :, queries] = out, lse
    assert_same([*whole, *grads], expected([grad_out, q, k, v], mask), mask.seq_len_tokens)


def test_usable_columns_are_those_of_earlier_inactive_blocks() -> None:
    _, mask = problem(tokens=150, padding=0, block=32, toeplitz=True, columns=100)
    assert mask.columns is not None
    q_blocks = [0, 2, 3, 4, 5]
    at = torch.cat([torch.arange(b * 32, (b + 1) * 32) for b in q_blocks])
    usable, limits = api.column_index(mask, at, backend="triton").data.bits
    for head in range(mask.heads):
        columns = mask.columns[head].tolist()
        for tile, block in enumerate(q_blocks):
            bits = [(int(usable[head, tile, c // 64]) >> (c % 64)) & 1 for c in range(len(columns))]
            right = [
                block < 5 and c < 150 and c // 32 < block and not mask.active[head, block - c // 32] for c in columns
            ]
            assert bits == [int(x) for x in right]
            before = sum(c < 150 and c // 32 < block for c in columns) if block < 5 else 0
            own = sum(c < 150 and c // 32 == block for c in columns) if not mask.active[head, 0] else 0
            reach = max((c + 1 for c, bit in enumerate(bits) if bit), default=0)
            assert limits[head, tile].tolist() == [reach, before, before + own]


def test_parts_fused_in_one_launch_agree() -> None:
    """Block part and columns in one launch, gradients written without accumulators: what one device alone runs."""
    (grad_out, q, k, v), mask = problem(tokens=100, padding=28, block=32, toeplitz=True, columns=70, documents=True)
    everything = torch.arange(128)
    whole = api.WholeAttention.of(mask, 128, device=q.device, backend="triton")
    assert whole.column is not None
    for ours, x in zip(api.gather_columns(k, v, whole.column), (k, v), strict=True):
        torch.testing.assert_close(ours, gathered.gather_columns(x, mask, everything), atol=0, rtol=0)
    queries = api.Queries(q=q, scale=SCALE)
    out, lse = whole.forward(queries, k, v)
    grads = whole.backward(queries, k, v, (out, lse), grad_out)
    assert_same([out, lse, *grads], expected([grad_out, q, k, v], mask), 100)


def test_no_column_slots_are_no_columns() -> None:
    """As after a budget of 0 columns: nothing of the index is there to be read."""
    (grad_out, q, k, v), mask = problem(tokens=64, padding=0, block=32, toeplitz=True, heads=(2, 1))
    mask = dataclasses.replace(mask, columns=torch.empty(2, 0, dtype=torch.int32))
    everything = torch.arange(64)
    index, of_columns = (api.block_index(mask, everything, everything, backend="triton"),
                         api.column_index(mask, everything, backend="triton"))  # fmt: skip
    column_k, column_v = api.gather_columns(k, v, of_columns)
    columns = column_k, column_v, of_columns
    out, lse = calls.column_forward(q, *columns, scale=SCALE)
    assert (out == 0).all() and (lse == -torch.inf).all()
    out, lse = calls.block_forward(q, k, v, index, scale=SCALE, columns=columns)
    grads = [torch.full_like(x, torch.nan) for x in (q, k, v)]
    into = dict(zip(("grad_q", "grad_k", "grad_v"), grads, strict=True))
    delta = api.backend_of("triton").row_products(grad_out, out)
    calls.block_backward(
        grad_out, q, k, v, lse, delta, index, scale=SCALE, columns=columns, grad_columns=(column_k, column_v),
        add_q=False, add_kv=False, **into,
    )  # fmt: skip
    assert_same([out, lse, *grads], expected([grad_out, q, k, v], mask), 64)


def test_columns_of_a_shard_are_gathered_and_added_back() -> None:
    (_, _, k, v), mask = problem(tokens=150, padding=10, block=32, toeplitz=True, columns=50)
    at = torch.cat([torch.arange(b * 32, (b + 1) * 32) for b in (1, 3, 4)])
    index = api.column_index(mask, at, backend="triton")
    for ours, x in zip(api.gather_columns(k[:, at], v[:, at], index), (k, v), strict=True):
        torch.testing.assert_close(ours, gathered.gather_columns(x[:, at], mask, at), atol=0, rtol=0)
    parts = [torch.randn(1, 4, 50, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) for i in (0, 1)]
    grads, right = ([torch.ones(1, 96, 2, 16, dtype=torch.float64) for _ in range(2)] for _ in range(2))
    api.scatter_columns((parts[0], parts[1]), index, api.KeyGradients(k=grads[0], v=grads[1], add=True))
    for part, grad, ours in zip(parts, right, grads, strict=True):
        gathered.scatter_columns(part, mask, at, grad=grad)
        torch.testing.assert_close(ours, grad, atol=1e-12, rtol=0)


def test_a_lost_entry_is_seen() -> None:
    """The comparison has teeth: an index that drops one tile fails it."""
    (_, q, k, v), mask = problem(tokens=96, padding=0, block=32, toeplitz=True, heads=(1, 1))
    mask = AttentionMask(seq_len_tokens=96, block_size=32, active=torch.ones_like(mask.active))
    index = api.block_index(mask, torch.arange(96), torch.arange(96), backend="triton")
    right, _ = reference_attention(q, k, v, mask, scale=SCALE)
    out, _ = calls.block_forward(q, k, v, index, scale=SCALE)
    torch.testing.assert_close(out, right, atol=TOLERANCE, rtol=0)
    index.data.queries.rows[0, 2, 1] -= 1
    out, _ = calls.block_forward(q, k, v, index, scale=SCALE)
    assert (out - right).abs().max() > 1e-3


def test_strided_inputs() -> None:
    """Views of [B, H, S, D] storage and of every second channel give what contiguous tensors give."""
    tensors, mask = problem(tokens=64, padding=0, block=32, toeplitz=True, heads=(2, 1), columns=8)
    right = run(tensors, mask)
    transposed = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors]
    spread = [torch.stack([x, x + 1], -1)[..., 0] for x in tensors]
    for views in (transposed, spread):
        assert not views[1].is_contiguous()
        assert_same(run(views, mask), right, 64)


def test_what_it_cannot_do_is_refused() -> None:
    tensors, mask = problem(tokens=64, padding=0, block=32, toeplitz=True)
    odd = AttentionMask(seq_len_tokens=60, block_size=20, active=torch.ones(4, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"mask\.block_size: 20"):
        api.block_index(odd, torch.arange(60), torch.arange(60), backend="triton")
    index = api.block_index(mask, torch.arange(64), torch.arange(64), backend="triton")
    _, q, k, v = tensors
    with pytest.raises(ValueError, match="q: head dim 12"):
        calls.block_forward(q[..., :12], k[..., :12], v[..., :12], index, scale=SCALE)
    with pytest.raises(ValueError, match="k: 32 tokens; the index was built for 64"):
        calls.block_forward(q, k[:, :32], v[:, :32], index, scale=SCALE)
