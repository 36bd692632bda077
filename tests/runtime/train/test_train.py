"""Training on real gloo processes, equal to the same model trained alone by plain PyTorch."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from rank_pool import RankPool
from sparsering.runtime.train.config import parse_config
from sparsering.traces.dataset.store import Trace
from train_alone import assert_same_training, pieces_of, trained_alone
from train_runs import write_run

Pools = Callable[[int], RankPool]


@pytest.mark.parametrize("attention", ["planned", "dense", "dense-zigzag"])
def test_density_one_equals_a_dense_model_alone(attention: str, tmp_path: Path, rank_pools: Pools) -> None:
    config = write_run(tmp_path, attention=attention)
    assert_same_training(rank_pools(2).run("train_jobs.run", config=config), trained_alone(config))


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_the_zigzag_ring_is_dense_attention(world_size: int, rank_pools: Pools) -> None:
    job = {"attention": "cpu", "seq_len_tokens": 64, "dtype": "float64"}
    for errors in rank_pools(world_size).run("train_jobs.dense_ring", **job):
        for name, (error, _) in errors.items():
            assert error < 1e-12, name


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_the_zigzag_ring_asks_flash4_for_dense_attention(world_size: int, rank_pools: Pools) -> None:
    job = {"attention": "flash4-contract", "seq_len_tokens": 64, "dtype": "bfloat16"}
    for errors in rank_pools(world_size).run("train_jobs.dense_ring", **job):
        for name, (error, plain) in errors.items():
            assert error <= 2 * plain, name


@pytest.mark.parametrize("family", ["llama", "mistral", "phi3", "qwen3"])
def test_families_that_are_called_tested(family: str, tmp_path: Path, rank_pools: Pools) -> None:
    changes = {"model_type": family, "head_dim": 8, "architectures": None, "pad_token_id": 0, "sliding_window": None}
    config = write_run(tmp_path, model=changes, seq_len_tokens=192, steps=2)
    assert_same_training(rank_pools(2).run("train_jobs.run", config=config), trained_alone(config))


def test_a_rank_without_a_valid_label_counts_nothing(tmp_path: Path, rank_pools: Pools) -> None:
    config = write_run(tmp_path, seq_len_tokens=60, steps=3)  # rank 1 owns tokens 64 … 127: padding only
    results = rank_pools(2).run("train_jobs.run", config=config)
    assert results[0]["valid"] == [59] * 3
    assert_same_training(results, trained_alone(config))


def test_replicas_and_microbatches_make_one_batch(tmp_path: Path, rank_pools: Pools) -> None:
    config = write_run(tmp_path, parallel={"data": 2, "context": 2}, microbatches=2, steps=3)
    assert_same_training(rank_pools(4).run("train_jobs.run", config=config), trained_alone(config))


def test_documents_are_trained_on_as_if_apart(tmp_path: Path, rank_pools: Pools) -> None:
    asked = {"loss": True, "positions": True, "attention": True}
    config = write_run(tmp_path, seq_len_tokens=1000, steps=3, attention="dense", data={"documents": asked})
    together = rank_pools(2).run("train_jobs.run", config=config)
    alone = trained_alone(config, per_document=True)
    pieces = [pieces_of(parse_config(config), step, 0, True) for step in range(3)]
    assert together[0]["valid"] == [sum(piece.numel() - 1 for piece in step) for step in pieces]
    assert_same_training(together, alone)


def test_attention_runs_forward_once_and_never_chooses_twice(tmp_path: Path, rank_pools: Pools) -> None:
    pattern = {"selector": "vertical-slash", "settings": {"columns": 16, "slashes": 40, "window_tokens": 20}}
    runs = {}
    for name, memory in (
        ("recomputed", {}),
        ("offloaded", {"offload": True}),
        ("partly", {"whole_layers": 1}),
        ("whole", {"checkpoint_layers": False}),
    ):
        config = write_run(tmp_path, microbatches=2, memory=memory, plan={"pattern": pattern})
        runs[name] = rank_pools(2).run("train_jobs.counted", config=config)[0]
        layers, microbatches = 2, 2
        assert runs[name]["chosen"] == runs[name]["forward"] == runs[name]["backward"] == layers * microbatches, name
        assert runs[name]["waits"] == runs["recomputed"]["waits"] > 0, name
    for name in ("offloaded", "partly", "whole"):
        for parameter, value in runs["recomputed"]["parameters"].items():
            np.testing.assert_array_equal(runs[name]["parameters"][parameter], value, err_msg=f"{name} {parameter}")


@pytest.mark.parametrize(("forward", "what"), [(True, "the output"), (False, "the gradient of the output")])
def test_nan_stops_before_the_optimizer_and_names_rank_and_layer(
    forward: bool, what: str, tmp_path: Path, rank_pools: Pools
) -> None:
    config = write_run(tmp_path)
    for answer in rank_pools(2).run("train_jobs.broken", config=config, rank=1, layer=1, forward=forward):
        assert answer["error"].startswith(f"step 1: {what} of layer 1 is not finite on rank 1;")
        assert answer["same"]


def test_live_patterns_become_a_trace_and_steps_become_metrics(tmp_path: Path, rank_pools: Pools) -> None:
    pattern = {"selector": "vertical-slash", "settings": {"columns": 8, "slashes": 8, "window_tokens": 8}}
    config = write_run(
        tmp_path, steps=4, plan={"pattern": pattern},
        metrics={"folder": str(tmp_path / "metrics"), "peak_flops_per_device": 1e9, "kept_mass_every_steps": 3},
        trace_out={"folder": str(tmp_path / "trace"), "every_steps": 2},
    )  # fmt: skip
    rank_pools(2).run("train_jobs.run", config=config)
    trace = Trace.open(tmp_path / "trace")
    trace.verify()
    assert trace.steps == (0, 2)
    for rank in range(2):
        lines = [json.loads(line) for line in (tmp_path / f"metrics/rank-{rank:05d}.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == [0, 1, 2, 3]
        assert all(0 < line["mfu_actual"] < line["mfu_dense_equivalent"] for line in lines)
        for line in lines:
            attention_ms = line["attention_forward_ms"] + line["attention_backward_ms"]
            assert 0 < line["exposed_communication_ms"] < attention_ms
        for step in trace.steps:
            densities = [trace.layer_pattern(step, layer).density for layer in trace.layers]
            assert lines[step]["density_per_layer"] == pytest.approx(densities)
            assert lines[step]["density"] < 1
            rows = [trace.layer_rows(step, layer) for layer in trace.layers]
            kept = [np.mean([row.choice.kept_mass_sampled or 0.0 for row in layer]) for layer in rows]
            assert lines[step]["kept_mass_per_layer"] == pytest.approx(kept)
        assert lines[3]["kept_mass"] == pytest.approx(np.mean(lines[3]["kept_mass_per_layer"]))
        assert 0 < lines[3]["kept_mass"] < 1
        assert lines[1]["kept_mass"] is None  # neither asked for nor recorded
    rows = trace.layer_rows(2, 1)
    assert all(0 < (row.choice.kept_mass_sampled or 0) <= 1 for row in rows)
