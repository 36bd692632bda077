"""Attached models on real gloo processes: right families equal the model alone, wrong calls are one line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from model_cases import RIGHT, case_config, case_model
from rank_pool import RankPool
from sparsering.runtime.hf.capture import CaptureSettings, capture_model, trace_header
from sparsering.runtime.model.shard import IGNORED_LABEL
from sparsering.runtime.pattern.selectors import make_selector
from sparsering.runtime.train.model import build_model
from sparsering.traces.dataset.store import Trace
from sparsering.traces.dataset.writer import TraceWriter
from sparsering.traces.files import write_json
from train_runs import write_run

Pools = Callable[[int], RankPool]
SEQ_LEN_TOKENS = 256
EAGER_ALONE = ("gemma2", "gpt-oss", "gpt-oss-routers", "mimo")  # torch's attention has neither softcaps nor sinks
TAKES_SHIFTED_LABELS = ("bart",)  # its class computes the loss of every logit with its own label
HEAD_GAIN = 50.0  # as after training: scales and caps of logits show


def batch(*, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return ids and labels [1, S] with most of the labels of the first shard left out."""
    generator = np.random.default_rng(seed)
    ids = generator.integers(3, 256, (1, SEQ_LEN_TOKENS))
    labels = np.where(
        generator.random(ids.shape) < np.where(np.arange(SEQ_LEN_TOKENS) < 64, 0.9, 0.2), IGNORED_LABEL, ids
    )
    return ids, labels


@pytest.mark.parametrize("name", RIGHT)
def test_a_right_family_equals_the_model_alone(name: str, rank_pools: Pools) -> None:
    ids, labels = batch()
    alone = case_model(name, head_gain=HEAD_GAIN).train()
    if name not in EAGER_ALONE:
        alone.set_attn_implementation("sdpa")  # eager attention rounds to float32
    taken = torch.from_numpy(labels)
    if name in TAKES_SHIFTED_LABELS:
        taken = torch.nn.functional.pad(taken[:, 1:], (0, 1), value=IGNORED_LABEL)
    output = alone(input_ids=torch.from_numpy(ids), labels=taken)
    output.loss.backward()
    results = rank_pools(2).run("case_step", name=name, ids=ids, labels=labels, head_gain=HEAD_GAIN)
    assert sum(result["loss"] for result in results) == pytest.approx(output.loss.item(), rel=1e-6)
    for result in results:
        np.testing.assert_allclose(
            result["logits"], output.logits[:, result["positions"]].detach().numpy(), rtol=1e-6, atol=1e-5
        )
    largest = max(float(p.grad.abs().max()) for p in alone.parameters() if p.grad is not None)
    for parameter_name, parameter in alone.named_parameters():
        if parameter.grad is None:
            assert all(parameter_name not in result["gradients"] for result in results)
            continue
        summed = sum(result["gradients"][parameter_name] for result in results)
        # Norms round to float32 in float64 models too; a gradient that is zero but for rounding has no size.
        room = 1e-6 * max(float(parameter.grad.abs().max()), 1e-4 * largest)
        np.testing.assert_allclose(summed, parameter.grad.numpy(), rtol=0, atol=room, err_msg=parameter_name)


def test_autocast_computes_in_the_plans_type(rank_pools: Pools) -> None:
    results = rank_pools(2).run("autocast_step")
    ids = torch.from_numpy(results[0]["ids"])
    wanted = case_model("llama", dtype=torch.float32)(input_ids=ids, labels=ids).loss.item()
    assert sum(result["loss"] for result in results) == pytest.approx(wanted, rel=5e-3)
    assert all(result["types"] == ["torch.float32"] for result in results)


def test_wrong_calls_of_an_attached_model_are_one_line(rank_pools: Pools) -> None:
    wanted = {
        "no positions": "position_ids: is missing",
        "other rank": "position_ids: are not those of this rank's shard",
        "other length": "position_ids: shape (1, 64) is not [B, 128]",
        "no shifted labels": "shift_labels: is missing beside labels",
        "no count": "num_items_in_batch: is missing beside labels",
        "two sequences": "batch size: is 2; patterns are chosen for one sequence at a time",
        "router losses": "output_router_logits: is on",
        "labels by place": "shift_labels: is missing beside labels",
        "another attention": "attn_implementation: is 'sdpa' since it was attached",
        "attached twice": "model: is attached already",
        "body alone": "position_ids: is missing",
        "detached copy": "model: was detached from its plan",
    }
    for told in rank_pools(2).run("guarded_calls"):
        for name, message in told.items():
            assert message.startswith(wanted[name]) if name in wanted else not message, (name, message)
            assert "\n" not in message


def test_ranks_are_compared_when_they_first_compute_a_loss(rank_pools: Pools) -> None:
    wanted = {
        "right": "",
        "own count": "num_items_in_batch: is ",
        "not shifted": "shift_labels: are the tokens themselves, not shifted",
        "other weights": "first loss ",
    }
    for told in rank_pools(2).run("first_losses"):
        assert told.keys() == wanted.keys()
        for name, message in told.items():
            assert message.startswith(wanted[name]) and bool(message) == bool(wanted[name]), (name, message)


def test_a_plan_that_pads_beyond_learned_positions_is_refused(rank_pools: Pools) -> None:
    for told in rank_pools(2).run("padded_beyond_positions"):
        assert told.startswith("max_position_embeddings: is 250; the plan pads 250 tokens to 256")


@pytest.mark.parametrize("name", ["granite", "granite-scale-1", "llama", "gemma3"])
def test_patterns_captured_and_attended_are_the_same(name: str, tmp_path: Path, rank_pools: Pools) -> None:
    settings = {"column_mass": 0.5, "column_cap": 256, "slash_mass": 0.5, "slash_cap": 256}
    ids, _ = batch(seed=1)
    model = case_model(name)
    header = trace_header(model, model_id=name, seq_len_tokens=SEQ_LEN_TOKENS, block_size=64)
    with TraceWriter(tmp_path / "trace", header) as writer:
        selector = make_selector("flex", settings)
        capture_model(model, torch.from_numpy(ids)[0], writer, CaptureSettings(selector=selector, sparse=True))
    trace = Trace.open(tmp_path / "trace")
    captured = [[head.columns.tolist() for head in trace.layer_pattern(0, layer).heads] for layer in trace.layers]
    for attended in rank_pools(2).run("chosen_columns", name=name, ids=ids, settings=settings):
        assert attended == captured
    assert 0 < np.mean([len(head) for layer in captured for head in layer]) < 250, "the choice leaves something out"


@pytest.mark.parametrize(
    "name", ["granite", "gemma3-capped", "cohere", "phi-bias", "qwen3-moe", "gpt2", "falcon", "bert"]
)
def test_the_trainer_computes_the_models_own_loss(name: str, tmp_path: Path, rank_pools: Pools) -> None:
    steps = 2
    raw = write_run(
        tmp_path, steps=steps, dtype="float32", memory={"checkpoint_layers": True},
        optimizer={"learning_rate": 1e-3, "warmup_steps": 0, "clip_norm": None, "weight_decay": 0.0},
    )  # fmt: skip
    write_json(
        tmp_path / "model/config.json", case_config(name).to_diff_dict() | {"model_type": case_config(name).model_type}
    )
    results = rank_pools(2).run("train_jobs.run", config=raw)
    losses, norms = trained_alone(raw)
    for result in results:
        np.testing.assert_allclose(result["losses"], losses, rtol=1e-5)
        np.testing.assert_allclose(result["norms"], norms, rtol=1e-4)


def trained_alone(raw: dict[str, Any]) -> tuple[list[float], list[float]]:
    """Train by the model's own forward and loss, in one process, with plain AdamW."""
    from sparsering.runtime.data.shards import TokenData
    from sparsering.runtime.train.config import parse_config
    from sparsering.runtime.train.model import read_model_config
    from sparsering.runtime.train.optimizer import learning_rate

    config = parse_config(raw)
    model = build_model(
        config.model, read_model_config(config.model), device=torch.device("cpu"), dtype=torch.float32, seed=config.seed
    )
    model.set_attn_implementation("eager")
    section = config.optimizer
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0, betas=section.betas, eps=section.epsilon, weight_decay=0)
    data, losses, norms = TokenData.open(config.data.folder), [], []
    for step in range(config.steps):
        sequence = data.at_step(step, 0, slots=1, seq_len_tokens=config.seq_len_tokens, seed=config.seed)
        ids = torch.from_numpy(sequence.tokens)[None].long()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), float("inf")).item())
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, section, config.steps)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, norms
