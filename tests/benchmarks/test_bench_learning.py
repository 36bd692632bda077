"""benchmarks/learning.py on CPUs: arms of a study are trained and judged by their own attention and densely."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sparsering.benchmarks.lib.learning.study import read_study
from sparsering.runtime.data.writer import byte_tokenizer, write_data
from sparsering.traces.errors import InputError
from sparsering.traces.files import read_json

STUDIES = Path(__file__).parents[2] / "benchmarks" / "studies"
SHAPE: dict[str, Any] = {
    "vocab_size": 256, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "tie_word_embeddings": True,
}  # fmt: skip
STUDY = """
about: a test
margins: {heldout_loss_share: 0.5}
rope_parameters: {rope_type: yarn, factor: 2.0, rope_theta: 10000.0, original_max_position_embeddings: 512}
train:
  seq_len_tokens: 1024
  steps: 6
  data: {documents: {loss: true}}
  dtype: float32
  optimizer: {learning_rate: 1.0e-2, warmup_steps: 1}
judged: {sequences: 2, cut_context_tokens: 256, lengths: [512, 1024], needles: [2], depths: 2, keys: 2}
arms:
  dense: {attention: dense-zigzag}
  chosen: {plan: {pattern: {selector: block-mass, settings: {probe_stride: 8, least_mass: 0.2}}}}
  whole: {plan: {pattern: {selector: block-mass, settings: {least_mass: 1.0e-9}}}}
  rounded: {steps: 2, dtype: bfloat16, plan: {pattern: {selector: block-mass, settings: {least_mass: 0.1}}}}
"""


def _run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")} | {"PYTHONSAFEPATH": "1"}
    command = [sys.executable, "-W", "ignore", "-m", "sparsering.benchmarks.learning", str(folder / "study.yaml"),
               "--model", str(folder / "model"), "--data", str(folder / "data"), "--heldout", str(folder / "heldout"),
               "--device", "cpu", "--results", str(folder), *arguments]  # fmt: skip
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("learning")
    (place / "study.yaml").write_text(STUDY)
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SHAPE)).save_pretrained(place / "model")
    for name, turns in (("data", 900), ("heldout", 500)):
        (place / f"{name}.txt").write_text("".join(f"{name} {turn} {turn * turn}.\n" for turn in range(turns)))
        write_data([place / f"{name}.txt"], place / name, byte_tokenizer())
    return place


@pytest.mark.slow
def test_arms_are_trained_and_judged(folder: Path) -> None:
    done = _run(folder, "--gpus", "2")
    assert done.returncode == 0, done.stderr
    (path,) = folder.glob("eval-*.json")
    dense, chosen, whole, rounded = read_json(path)["rows"]
    assert [one["arm"] for one in (dense, chosen, whole)] == ["dense", "chosen", "whole"]
    assert dense["selector"] == "dense" and chosen["settings"] == {"probe_stride": 8, "least_mass": 0.2}
    # All arms start from the same weights and see the same tokens; what attends everything is dense attention.
    assert chosen["train_losses"][0] == pytest.approx(dense["train_losses"][0], abs=0.05)
    assert whole["train_losses"] == pytest.approx(dense["train_losses"], abs=2e-4)
    assert whole["total_density"] == pytest.approx(1.0) and chosen["total_density"] < 0.7
    assert whole["heldout_loss"] == pytest.approx(whole["heldout_loss_dense"], abs=1e-5)
    assert whole["heldout_loss"] == pytest.approx(dense["heldout_loss"], abs=2e-3)
    assert chosen["heldout_loss"] != chosen["heldout_loss_dense"]
    assert dense["train_losses"][-1] < dense["train_losses"][0] - 0.3
    assert rounded["heldout_loss"] == pytest.approx(rounded["heldout_loss_dense"], abs=0.1)
    for row in (dense, chosen, whole):
        assert len(row["train_losses"]) == row["steps"] == 6
        assert 0 <= row["needle_last"] <= 1 and 0 <= row["needle_mid"] <= 1
        assert row["step_ms"] > row["attention_forward_ms"] > 0


@pytest.mark.slow
def test_an_arm_that_was_kept_is_judged_again_by_other_ranks(folder: Path, tmp_path: Path) -> None:
    kept = ("--arms", "rounded", "--weights", str(tmp_path / "kept"))
    rows = []
    for place, gpus in (("first", "2"), ("second", "1")):
        done = _run(folder, *kept, "--gpus", gpus, "--results", str(tmp_path / place))
        assert done.returncode == 0, done.stderr
        (path,) = (tmp_path / place).glob("eval-*.json")
        rows += read_json(path)["rows"]
    first, second = ({name: value for name, value in row.items() if name != "judged_s"} for row in rows)
    assert first == second and first["world_size"] == 2
    weights = tmp_path / "kept" / "rounded.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    done = _run(folder, *kept)
    assert done.returncode == 2
    assert "rounded.safetensors: weights_digest: is not what was trained" in done.stderr


@pytest.mark.slow
def test_steps_alone_are_timed(folder: Path, tmp_path: Path) -> None:
    done = _run(folder, "--arms", "chosen", "--steps", "2", "--results", str(tmp_path))
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("eval-*.json")
    (row,) = read_json(path)["rows"]
    assert len(row["train_losses"]) == 2 and "heldout_loss" not in row


@pytest.mark.slow
def test_what_cannot_be_judged_is_said_before_anything_is_trained(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "few.txt").write_text("too little to hold a sequence of the study. " * 20)
    write_data([tmp_path / "few.txt"], tmp_path / "few", byte_tokenizer())
    done = _run(folder, "--arms", "dense", "--heldout", str(tmp_path / "few"), "--results", str(tmp_path))
    assert done.returncode != 0
    assert "few: tokens: holds 881 tokens, a sequence has 1024" in done.stderr
    assert not list(tmp_path.glob("eval-*.json"))


@pytest.mark.parametrize("path", sorted(STUDIES.glob("*.yaml")), ids=lambda path: path.stem)
def test_studies_hold_arms_that_can_be_trained(path: Path, tmp_path: Path) -> None:
    study = read_study(path)
    for arm in study.arms:
        config = study.config(arm, model=tmp_path, data=tmp_path, context=2)
        assert study.evaluations(config, sparse=config.attention == "planned")


def test_an_arm_that_is_not_there_is_one_line(folder: Path) -> None:
    with pytest.raises(InputError, match="arms: 'dens' is not one of dense, chosen, whole, rounded; did you mean"):
        read_study(folder / "study.yaml").config("dens", model=folder, data=folder, context=1)
