"""A training run notices what one rank does wrong, says which and what, and stops before its parameters change."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from model_cases import case_config
from rank_pool import RankPool
from train_runs import write_run

Pools = Callable[[int], RankPool]
ATTENTION = "K/V head|query head"
EVERYTHING = {"every_steps": 1, "rows": 64, "layers": 2}
RANK = 1

# fault -> what is said of it, a regular expression
TOLD = {
    "mask": r"the pattern of layer 0 differs between ranks 0, 1; .*out of layer \d, query head \d, is not",
    "merge": r"out of layer \d, query head \d, is not what its pattern says on rank 1,",
    "stale receives": r"out of layer \d, query head \d, is not what its pattern says on rank 1\b",
    "corrupted sends": r"out of layer \d, query head \d, is not what its pattern says on rank 0,",
    "gathered weights": "the checksum of a layer's gathered weights differs between ranks 0, 1",
    "a parameter": "parameters on rank 1 changed since the last step ended",
    "a moment": "optimizer states on rank 1 changed since the last step ended",
    "weight decay": "the setting of torch and the optimizer differs between ranks 0, 1",
    "arithmetic": "the setting of torch and the optimizer differs between ranks 0, 1",
    "other data": "the sequence that was read differs between ranks 0, 1",
    "labels": "labels of the batch on rank 1 are not those of its sequence",
    "tokens": "tokens of the batch on rank 1 are not those of its sequence",
    "positions": "positions of the batch on rank 1 are not those of its sequence",
    "documents": "documents of the batch on rank 1 are not those of its sequence",
    "dq": r"dq of layer \d, query head \d, is not what its pattern says on rank 1,",
    "dk": r"dk of layer \d, K/V head \d, is not what its pattern says on rank 1,",
    "dv": r"dv of layer \d, K/V head \d, is not what its pattern says on rank 1,",
}


def run_with(folder: Path, **changes: Any) -> dict[str, Any]:
    """A run whose attention takes several launches and transfers, every step of which is checked."""
    settled = {"verify": EVERYTHING, "plan": {"layout": "ring"}, "metrics": {"folder": str(folder / "metrics")}}
    return write_run(folder, **settled, **changes)


@pytest.mark.parametrize("fault", TOLD)
def test_a_fault_of_one_rank_is_named_before_the_optimizer_steps(fault: str, tmp_path: Path, rank_pools: Pools) -> None:
    documents = {"attention": fault == "documents", "positions": fault == "positions"}
    config = run_with(tmp_path, data={"documents": documents})
    results = rank_pools(2).run("fault_jobs.faulted", config=config, fault=fault, rank=RANK)
    (told,) = {result["told"] for result in results}  # all ranks say the same
    assert told.startswith("step 1: the run's check of itself failed: ")
    assert re.search(TOLD[fault], told), told
    assert all(result["same"] for result in results)
    kept = sorted((tmp_path / "metrics").glob("failed-check-step-00000001-rank-*.npz"))
    assert bool(kept) == bool(re.search(ATTENTION, told))
    for path in kept:
        with np.load(path) as file:
            wrong = [name.removesuffix(".found") for name in file if name.endswith(".found")]
            assert wrong
            for name in wrong:
                error = np.abs(file[f"{name}.found"] - file[f"{name}.wanted"])
                assert not (error <= file[f"{name}.bound"]).all()


def test_documents_that_differ_choose_patterns_that_differ(tmp_path: Path, rank_pools: Pools) -> None:
    config = run_with(tmp_path, data={"documents": {"attention": True, "positions": False}})
    for result in rank_pools(2).run("fault_jobs.faulted", config=config, fault="cut documents", rank=RANK):
        assert result["told"].startswith("step 1: ranks chose different patterns")
        assert result["same"]


@pytest.mark.parametrize(("fault", "name"), [("sinks", "gpt-oss"), ("softcap", "gemma2"), ("window", "gemma3-window")])
def test_what_a_model_adds_to_attention_is_looked_into(
    fault: str, name: str, tmp_path: Path, rank_pools: Pools
) -> None:
    config = run_with(tmp_path, model=case_config(name).to_dict())
    config["verify"] = EVERYTHING | {"layers": 3}
    for result in rank_pools(2).run("fault_jobs.faulted", config=config, fault="nothing", rank=RANK):
        assert result == {"told": "", "same": False}
    for result in rank_pools(2).run("fault_jobs.faulted", config=config, fault=fault, rank=RANK):
        assert re.search(
            r"(out|lse) of layer \d, query head \d, is not what its pattern says on rank 1", result["told"]
        )
        assert result["same"]


def test_a_run_without_a_fault_goes_on(tmp_path: Path, rank_pools: Pools) -> None:
    config = run_with(tmp_path)
    for result in rank_pools(2).run("fault_jobs.faulted", config=config, fault="nothing", rank=RANK):
        assert result == {"told": "", "same": False}
    assert not list(tmp_path.rglob("failed-check*"))


def test_most_ranks_name_the_one_that_differs(tmp_path: Path, rank_pools: Pools) -> None:
    config = run_with(tmp_path, parallel={"context": 3}, seq_len_tokens=384)
    for fault, told in {
        "weight decay": "the setting of torch and the optimizer on rank 1 is not that of the others",
        "other data": "the sequence that was read on rank 1 is not that of the others",
        "corrupted sends": "on ranks 0, 2 (on all but rank 1)",
        "mask": "the pattern of layer 0 on rank 1 is not that of the others",
    }.items():
        results = rank_pools(3).run("fault_jobs.faulted", config=config, fault=fault, rank=RANK)
        assert told in results[0]["told"], results[0]["told"]


def test_replicas_are_held_to_their_own_sequences(tmp_path: Path, rank_pools: Pools) -> None:
    config = run_with(tmp_path, parallel={"data": 2, "context": 2})
    results = rank_pools(4).run("fault_jobs.faulted", config=config, fault="nothing", rank=3)
    assert {result["told"] for result in results} == {""}
    results = rank_pools(4).run("fault_jobs.faulted", config=config, fault="other data", rank=3)
    assert "the sequence that was read differs between ranks 2, 3" in results[0]["told"]


@pytest.mark.parametrize("fault", ["corrupted sends", "other data"])
def test_steps_between_are_not_checked(fault: str, tmp_path: Path, rank_pools: Pools) -> None:
    config = run_with(tmp_path) | {"verify": EVERYTHING | {"every_steps": 2}}  # steps 0, 2, 4, …
    results = rank_pools(2).run("fault_jobs.faulted", config=config, fault=fault, rank=RANK)
    assert {result["told"] for result in results} == {""}


def test_in_poisoned_buffers_stale_data_shows_in_any_step(tmp_path: Path, rank_pools: Pools) -> None:
    config = run_with(tmp_path) | {"verify": {"every_steps": 1000, "poison": True}}
    told = rank_pools(2).run("fault_jobs.faulted", config=config, fault="stale receives", rank=RANK)[0]["told"]
    assert re.match(r"step 1: the output of layer 0 is not finite on rank 1; ", told), told
    assert rank_pools(2).run("fault_jobs.faulted", config=config, fault="nothing", rank=RANK)[0]["told"] == ""


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
@pytest.mark.parametrize("layout", ["ring", "gather"])
def test_rounding_stays_far_within_its_bound(dtype: str, layout: str, tmp_path: Path, rank_pools: Pools) -> None:
    """And the bound is no wide one: rounding takes more than a hundredth of it."""
    pattern = {"selector": "vertical-slash", "settings": {"columns": 8, "slashes": 2, "window_tokens": 64}}
    config = write_run(
        tmp_path, verify=EVERYTHING, dtype=dtype, seq_len_tokens=1000, plan={"layout": layout, "pattern": pattern}
    )
    for found in rank_pools(2).run("fault_jobs.excesses", config=config):
        assert set(found) == {"out", "lse", "dq", "dk", "dv"}
        assert max(found.values()) < 0.5, found
        assert max(found.values()) > 0.01 or dtype == "float64", found
