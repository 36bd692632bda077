"""Choosing on a GPU (`pytest -m gpu`): the kernels' choice against tensor operations in float32 on the CPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from select_cases import load
from sparsering.kernels.mask import AttentionMask
from sparsering.kernels.select.moba_block import MobaBlock
from sparsering.kernels.select.probe import (
    ALONE,
    ShardTensors,
    column_sums,
    kept_mass_probe,
    last_positions,
    probabilities,
    query_rows,
    row_logits,
    slash_sums,
)
from sparsering.kernels.select.probe_triton import column_and_slash_sums
from sparsering.kernels.select.rows.block_mass import BlockMass
from sparsering.kernels.select.rows.xattention import XAttention
from sparsering.kernels.select.vertical_slash import FixedVerticalSlash, FlexVerticalSlash, choose_by_head

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


@pytest.mark.parametrize("selector", [
    FixedVerticalSlash(columns=50, slashes=140),
    FlexVerticalSlash(column_mass=0.6, column_cap=700, slash_mass=0.5, slash_cap=300),
])  # fmt: skip
@pytest.mark.parametrize("granularity", [128, 64])
def test_vertical_slash_is_the_choice_of_the_cpu(selector, granularity):
    seq_len = 8192
    q, k = tensors(seq_len, torch.bfloat16)
    choices, sums = {}, {}
    for device, (queries, keys) in {"cuda": (q, k), "cpu": (q.float(), k.float())}.items():
        shard = shard_of(queries, keys, device, seq_len=seq_len, granularity=granularity)
        choices[device] = selector.choose(shard, scale=0.2)
        at = last_positions(shard)
        sums[device] = column_sums(shard, probabilities(row_logits(shard, query_rows(shard, at, ALONE), at, scale=0.2),
                                                        ALONE))  # fmt: skip
    for head in range(4):
        gpu, cpu = ({c for c in mask.columns[head].tolist() if c < seq_len} for mask in choices.values())
        assert len(gpu) > 20
        cut = min(float(sums["cpu"][head][column]) for column in cpu)
        for column in gpu ^ cpu:
            assert abs(float(sums["cpu"][head][column]) - cut) <= NEAR, f"head {head}, column {column}"
        differ = choices["cuda"].active[head].cpu() ^ choices["cpu"].active[head]
        assert differ.sum() <= 2, f"head {head}: diagonals {differ.nonzero().flatten().tolist()}"


def test_choosing_agrees_with_the_cpu_and_never_waits():
    data = load("structured")
    q, k = (torch.from_numpy(data[name]) for name in ("q", "k"))
    fixed = FixedVerticalSlash(columns=int(data["fixed"][0]), slashes=int(data["fixed"][1]))
    flex = FlexVerticalSlash(column_mass=0.6, column_cap=300, slash_mass=0.6, slash_cap=300)
    budgets = [fixed.budget, flex.budget] * 2

    def choose_all(device: str) -> list[AttentionMask]:
        shard = ShardTensors(
            q=q[None].to(device), k=k[None].to(device), positions=torch.arange(1024, device=device),
            seq_len_tokens=1024, block_size=64, granularity_tokens=1024,
        )  # fmt: skip
        choose_by_head(shard, budgets, scale=0.2, collectives=ALONE)  # the first one copies budgets to the device
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error" if device == "cuda" else "default")
        try:
            chosen = [
                choose_by_head(shard, budgets, scale=float(data["scale"]), collectives=ALONE),
                XAttention().choose(shard, scale=0.2),
                BlockMass().choose(shard, scale=0.2),
                MobaBlock(chunk_tokens=128, top_chunks=3).choose(shard, scale=0.2),
            ]
            kept_mass_probe(shard, chosen[0], scale=0.2)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return [mask.to("cpu") for mask in chosen]

    for ours, wanted in zip(choose_all("cuda"), choose_all("cpu"), strict=True):
        assert torch.equal(ours.active, wanted.active)
        assert wanted.columns is None or (ours.columns is not None and torch.equal(ours.columns, wanted.columns))


@pytest.mark.parametrize(("tokens", "seq_len"), [(8192, 8192), (5000, 5000)])
def test_xattention_is_the_choice_of_the_cpu(tokens, seq_len):
    q, k = tensors(tokens, torch.bfloat16)
    on_gpu = shard_of(q, k, "cuda", seq_len=seq_len, granularity=tokens)
    on_cpu = shard_of(q.float(), k.float(), "cpu", seq_len=seq_len, granularity=tokens)
    gpu = XAttention(mass=0.6).choose(on_gpu, scale=0.5).active.cpu()
    cpu = XAttention(mass=0.6).choose(on_cpu, scale=0.5).active
    assert 0.2 < cpu.tril().sum() / (cpu.shape[0] * cpu.shape[1] ** 2 / 2) < 0.9
    assert (gpu ^ cpu).sum() <= 1e-3 * cpu.sum()


@pytest.mark.parametrize(("tokens", "seq_len"), [(8192, 8192), (5000, 5000)])
@pytest.mark.parametrize(("stride", "softcap", "packed"), [(8, None, False), (1, 20.0, False), (16, None, True)])
def test_block_mass_is_the_choice_of_the_cpu(tokens, seq_len, stride, softcap, packed):
    q, k = tensors(tokens, torch.bfloat16)
    documents = (torch.arange(tokens) >= 3000).int() if packed else None
    choices = {}
    for device, (queries, keys) in {"cuda": (q, k), "cpu": (q.float(), k.float())}.items():
        shard = shard_of(queries, keys, device, seq_len=seq_len, granularity=tokens)
        shard = replace(shard, softcap=softcap, documents=None if documents is None else documents.to(device))
        choices[device] = BlockMass(probe_stride=stride, least_mass=0.03).choose(shard, scale=0.5).active.cpu()
    cpu = choices["cpu"]
    assert 0.1 < cpu.tril().sum() / (cpu.shape[0] * cpu.shape[1] ** 2 / 2) < 0.9
    assert (choices["cuda"] ^ cpu).sum() <= 1e-3 * cpu.sum()
