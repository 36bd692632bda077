"""Training over NCCL on the GPUs of one host: dense rings against float64, all attentions alike, bitwise resume.

Run with: pytest -m gpu tests/runtime/train/test_gpu_training.py -v
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rank_pool import RankPool, gpu_ranks
from sparsering.traces.errors import UnsupportedError
from train_runs import write_run

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(570)]
WORLD_SIZE = 2
MODEL = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "max_position_embeddings": 8192}
FULL = {"selector": "sink-window", "settings": {"sink_tokens": 0, "window_tokens": 4096}}
SPARSE = {"selector": "vertical-slash", "settings": {"columns": 128, "slashes": 160}}


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    with gpu_ranks(WORLD_SIZE) as ranks:
        yield ranks


def _config(folder: Path, **changes: Any) -> dict[str, Any]:
    common = {
        "model": MODEL, "seq_len_tokens": 4096, "dtype": "bfloat16", "device": "cuda", "steps": 4, "documents": 40,
        "plan": {"block_size": 128, "pattern": FULL},
    }  # fmt: skip
    return write_run(folder, **(common | changes))


def _flash4_runs_here() -> bool:
    import torch

    from sparsering.runtime.baselines.flash4 import require_flash4_on

    try:
        require_flash4_on(torch.device("cuda", 0))
    except UnsupportedError:
        return False
    return True


@pytest.mark.parametrize("attention", ["cudnn", "flash4", "torch"])
def test_dense_rings_are_as_exact_as_plain_torch(attention: str, pool: RankPool) -> None:
    if attention == "flash4" and not _flash4_runs_here():
        pytest.skip("needs the flash-attn-4 wheels and a GPU that they run on")
    for errors in pool.run("train_jobs.dense_ring", attention=attention, seq_len_tokens=4096, dtype="bfloat16"):
        for name, (error, plain) in errors.items():
            assert error <= 2 * plain, f"{name}: {error} against {plain} of plain torch"


def test_all_attentions_train_alike(tmp_path: Path, pool: RankPool) -> None:
    runs = {}
    flash4 = ["dense-zigzag-flash4"] if _flash4_runs_here() else []
    for attention in ("planned", "dense", "dense-zigzag", *flash4, "torch-context-parallel"):
        config = _config(tmp_path / attention, attention=attention)
        runs[attention] = pool.run("train_jobs.run", config=config)[0]
    for attention, run in runs.items():
        np.testing.assert_allclose(run["losses"], runs["dense"]["losses"], atol=0.02, err_msg=attention)
        np.testing.assert_allclose(run["norms"], runs["dense"]["norms"], rtol=0.05, err_msg=attention)


@pytest.mark.parametrize("loss", ["chunked", "liger"])
def test_a_stopped_run_resumes_bitwise(loss: str, tmp_path: Path, pool: RankPool) -> None:
    if loss == "liger":
        pytest.importorskip("liger_kernel")
    runs = {}
    for name in ("whole", "stopped"):
        checkpoint = {"folder": str(tmp_path / name / "checkpoints"), "every_steps": 2}
        config = _config(
            tmp_path / name, checkpoint=checkpoint, memory={"loss": loss}, plan={"block_size": 128, "pattern": SPARSE}
        )
        if name == "stopped":
            pool.run("train_jobs.run", config=config, stop_before=3)
        runs[name] = pool.run("train_jobs.run", config=config)[0]
    assert runs["stopped"]["first"] == 2
    for name, value in runs["whole"]["parameters"].items():
        np.testing.assert_array_equal(runs["stopped"]["parameters"][name], value, err_msg=name)


@pytest.mark.parametrize("plan", [{"layout": "ring"}, {"layout": "gather"}], ids=lambda plan: plan["layout"])
def test_twenty_steps_are_equal_bit_by_bit(plan: dict[str, Any], tmp_path: Path, pool: RankPool) -> None:
    config = _config(tmp_path, steps=20, plan={"block_size": 128, "pattern": SPARSE, **plan})
    first, second = (pool.run("train_jobs.run", config=config)[0] for _ in range(2))
    assert len(first["losses"]) == 20
    assert first["losses"] == second["losses"] and first["norms"] == second["norms"]
    for name, value in first["parameters"].items():
        np.testing.assert_array_equal(second["parameters"][name], value, err_msg=name)
