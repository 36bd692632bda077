"""Choosing on a GPU (`pytest -m gpu`): the kernels' choice against tensor operations in float32 on the CPU."""

from __future__ import annotations

import pytest
import torch

from sparsering.kernels.select.choose import (
    ALONE,
    FixedBudget,
    FlexBudget,
    ShardTensors,
    choose_vertical_slash,
    choose_xattention,
    vertical_slash_budgets,
)
from sparsering.kernels.select.probe import (
    column_sums,
    last_positions,
    probabilities,
    query_rows,
    row_logits,
    slash_sums,
)
from sparsering.kernels.select.probe_triton import column_and_slash_sums

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
NEAR = 1e-5  # of the cut: there, float32 sums may fall on either side


def tensors(seq_len: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys [1, S, H, D] with some keys and some distances that stand out."""
    generator = torch.Generator().manual_seed(seq_len)
    q, k = (torch.randn(1, seq_len, heads, 64, generator=generator) for heads in (4, 2))
    k[:, 5 :: seq_len // 37] += 0.5 * q[:, -40:, :1].mean(1, keepdim=True)
    return q.to(dtype), k.to(dtype)


def shard_of(q: torch.Tensor, k: torch.Tensor, device: str, *, seq_len: int, granularity: int) -> ShardTensors:
    return ShardTensors(
        q=q.to(device),
        k=k.to(device),
        positions=torch.arange(q.shape[1], device=device),
        seq_len_tokens=seq_len,
        block_size=128,
        granularity_tokens=granularity,
    )


@pytest.mark.parametrize(
    ("tokens", "seq_len", "granularity"), [(8192, 8192, 128), (4096, 4000, 64), (5000, 5000, 5000)]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_sums_are_those_of_float32(tokens, seq_len, granularity, dtype):
    q, k = tensors(tokens, dtype)
    on_gpu = shard_of(q, k, "cuda", seq_len=seq_len, granularity=granularity)
    exact = shard_of(q.double(), k.double(), "cpu", seq_len=seq_len, granularity=granularity)
    rows = query_rows(on_gpu, last_positions(on_gpu), ALONE)
    got = column_and_slash_sums(on_gpu, rows, first_row=seq_len - 64, scale=0.2, collectives=ALONE)
    again = column_and_slash_sums(on_gpu, rows, first_row=seq_len - 64, scale=0.2, collectives=ALONE)
    at = last_positions(exact)
    p = probabilities(row_logits(exact, query_rows(exact, at, ALONE), at, scale=0.2), ALONE)
    wanted = torch.stack([column_sums(exact, p), slash_sums(exact, p, at)])
    torch.testing.assert_close(got.double().cpu(), wanted, rtol=2e-5, atol=1e-7)
    assert torch.equal(got, again)


@pytest.mark.parametrize("budget", [
    FixedBudget(columns=50, slashes=140),
    FlexBudget(column_mass=0.6, column_cap=700, slash_mass=0.5, slash_cap=300),
])  # fmt: skip
@pytest.mark.parametrize("granularity", [128, 64])
def test_vertical_slash_is_the_choice_of_the_cpu(budget, granularity):
    seq_len = 8192
    q, k = tensors(seq_len, torch.bfloat16)
    choices, sums = {}, {}
    for device, (queries, keys) in {"cuda": (q, k), "cpu": (q.float(), k.float())}.items():
        shard = shard_of(queries, keys, device, seq_len=seq_len, granularity=granularity)
        budgets = vertical_slash_budgets([budget] * 4, seq_len_tokens=seq_len, device=device)
        choices[device] = choose_vertical_slash(shard, budgets, scale=0.2)
        at = last_positions(shard)
        sums[device] = column_sums(shard, probabilities(row_logits(shard, query_rows(shard, at, ALONE), at, scale=0.2),
                                                        ALONE))  # fmt: skip
    for head in range(4):
        gpu, cpu = (set(c.mask.columns[head][: c.column_counts[head]].tolist()) for c in choices.values())
        assert len(gpu) > 20
        cut = min(float(sums["cpu"][head][column]) for column in cpu)
        for column in gpu ^ cpu:
            assert abs(float(sums["cpu"][head][column]) - cut) <= NEAR, f"head {head}, column {column}"
        differ = choices["cuda"].mask.active[head].cpu() ^ choices["cpu"].mask.active[head]
        assert differ.sum() <= 2, f"head {head}: diagonals {differ.nonzero().flatten().tolist()}"


@pytest.mark.parametrize(("tokens", "seq_len"), [(8192, 8192), (5000, 5000)])
def test_xattention_is_the_choice_of_the_cpu(tokens, seq_len):
    q, k = tensors(tokens, torch.bfloat16)
    on_gpu = shard_of(q, k, "cuda", seq_len=seq_len, granularity=tokens)
    on_cpu = shard_of(q.float(), k.float(), "cpu", seq_len=seq_len, granularity=tokens)
    gpu = choose_xattention(on_gpu, scale=0.5, mass=0.6).active.cpu()
    cpu = choose_xattention(on_cpu, scale=0.5, mass=0.6).active
    assert 0.2 < cpu.tril().sum() / (cpu.shape[0] * cpu.shape[1] ** 2 / 2) < 0.9
    assert (gpu ^ cpu).sum() <= 1e-3 * cpu.sum()
