"""Attached models over NCCL on two GPUs: guards, heads that kernels pad, the loss of liger-kernel.

Run with: pytest -m gpu tests/runtime/hf/test_gpu_attach.py -v
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from model_cases import case_config
from rank_pool import RankPool, gpu_ranks
from sparsering.runtime.model.losses import liger_is_here, linear_cross_entropy_sum
from train_runs import write_run

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(570)]
WORLD_SIZE = 2
FULL = {"selector": "sink-window", "settings": {"sink_tokens": 0, "window_tokens": 4096}}


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    with gpu_ranks(WORLD_SIZE) as ranks:
        yield ranks


@pytest.mark.parametrize("name", ["llama", "head-dim-96", "head-dim-80", "granite", "gemma3-capped"])
def test_a_family_is_as_exact_as_plain_torch(name: str, pool: RankPool) -> None:
    for told in pool.run("attached_on_gpus", name=name):
        # Errors of loss and of all gradients against float64, ours and of the model alone in bfloat16.
        assert told["loss"] <= 2 * told["loss_alone"] + 1e-3
        assert told["gradient"] <= 2 * told["gradient_alone"], told


def test_positions_of_another_rank_are_refused_before_the_loss_is_used(pool: RankPool) -> None:
    for told in pool.run("wrong_positions_on_gpus"):
        assert told["right"] == ""
        assert told["wrong"].startswith("position_ids: are not those of this rank's shard")
        assert told["right again"] == ""


def test_a_mixture_of_experts_trains_as_the_dense_ring_does(tmp_path: Path, pool: RankPool) -> None:
    losses = {}
    for attention in ("planned", "dense-zigzag"):
        raw = write_run(
            tmp_path / attention, seq_len_tokens=4096, dtype="bfloat16", device="cuda", steps=3, documents=40,
            attention=attention, plan={"block_size": 128, "pattern": FULL},
        )  # fmt: skip
        case_config("qwen3-moe").save_pretrained(tmp_path / attention / "model")
        losses[attention] = pool.run("train_jobs.run", config=raw)[0]["losses"]
    assert losses["planned"] == pytest.approx(losses["dense-zigzag"], rel=5e-3)


@pytest.mark.parametrize(("softcap", "with_bias"), [(None, False), (None, True), (5.0, False), (5.0, True)])
def test_ligers_loss_is_ours(softcap: float | None, with_bias: bool) -> None:
    if not liger_is_here():
        pytest.skip("needs liger-kernel")
    generator = torch.Generator("cuda").manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device="cuda").requires_grad_()

    hidden, weight, bias = random(600, 64), random(512, 64), random(512) if with_bias else None
    labels = torch.randint(0, 512, (600,), generator=generator, device="cuda")
    labels[::3] = -100
    inputs = [tensor for tensor in (hidden, weight, bias) if tensor is not None]
    results: list[tuple[Any, ...]] = []
    for implementation in ("chunked", "liger"):
        total = linear_cross_entropy_sum(
            hidden, weight, labels, implementation=implementation, bias=bias, softcap=softcap, chunk_tokens=128
        )
        results.append((total, *torch.autograd.grad(total, inputs)))
    for ours, ligers in zip(*results, strict=True):
        torch.testing.assert_close(ligers, ours, rtol=2e-3, atol=2e-3 * float(ours.detach().abs().max()))
