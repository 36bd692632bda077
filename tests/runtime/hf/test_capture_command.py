"""The verb `sparsering capture`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from typer.testing import CliRunner

from sparsering import cli
from sparsering.runtime.pattern.section import parse_layers
from sparsering.traces.dataset.store import Trace
from sparsering.traces.errors import InputError


def test_layers_of_the_command_line() -> None:
    assert parse_layers("all") is None
    assert parse_layers("3, 0-1,7") == (0, 1, 3, 7)
    for wrong in ("", "a", "3-1", "1-", "-1", "1,,2", "0-999999999999"):
        with pytest.raises(InputError, match="--layers"):
            parse_layers(wrong, field="--layers")


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model (config and safetensors), a config alone, and two texts."""
    folder = tmp_path_factory.mktemp("workshop")
    config = AutoConfig.for_model(
        "qwen2", vocab_size=256, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=4096,
    )  # fmt: skip
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder / "model")
    config.save_pretrained(folder / "bare")
    (folder / "a.txt").write_text("To be, or not to be, that is the question. " * 40)
    (folder / "b.txt").write_bytes(bytes(range(256)) * 4)
    return folder


def invoke(*arguments: str | Path):
    return CliRunner().invoke(cli.app, ["capture", *map(str, arguments)])


def test_command_captures_continues_and_reports(workshop: Path, tmp_path: Path) -> None:
    start = ["--model", workshop / "model", "--text", workshop / "a.txt", workshop / "b.txt", "--seq-len", "512", "-o",
             tmp_path / "t", "--columns", "50", "--slashes", "60", "--json"]  # fmt: skip
    first = invoke(*start, "--steps", "1")
    assert first.exit_code == 0, first.output
    again = invoke(*start, "--steps", "3")
    assert again.exit_code == 0, again.output
    summary, trace = json.loads(again.stdout), Trace.open(tmp_path / "t")
    assert (summary["steps"], summary["digest"]) == ([0, 1, 2], trace.digest())
    assert (trace.header.model.model_id, trace.header.origin) == ("model", "real")
    assert {"torch", "transformers"} <= set(trace.header.versions)
    once = invoke(*start[:-5], "--columns", "50", "--slashes", "60", "--steps", "3", "-o", tmp_path / "once")
    assert once.exit_code == 0, once.output
    assert "vertical-slash" in once.stdout
    for ours, theirs in zip(trace.manifest.parts, Trace.open(tmp_path / "once").manifest.parts, strict=True):
        assert ours == theirs, "interrupted or not, the trace is the same"


def test_command_refuses_in_one_line(workshop: Path, tmp_path: Path) -> None:
    (tmp_path / "settings.json").write_text(json.dumps([{"0": ["vertical_and_slash", 9, 9, 0.0]}]))
    good = ["--model", workshop / "bare", "--random-weights", "--text", workshop / "a.txt", "--seq-len", "256", "-o",
            tmp_path / "t"]  # fmt: skip
    cases = {
        "no such file": [*good, "--model", workshop / "absent"],
        "holds no safetensors weights": [item for item in good if item != "--random-weights"],
        "tokens in 1 files; 9 windows of 256 need 2304": [*good, "--steps", "9"],
        "block-size: is 100": [*good, "--block-size", "100"],
        "cap: vertical-slash has no such setting": [*good, "--cap", "10"],
        "--window: flex has no such setting": [*good, "--selector", "flex", "--window", "7"],
        "recorded_layers has 5 in a model of 2": [*good, "--layers", "1,5"],
        "settings.json: layers: has 1 layers, the model has 2": [*good, "--settings", tmp_path / "settings.json"],
        "tokenizer: holds no tokenizer": [*good, "--tokenizer", "model"],
        "device: 'tpu' is": [*good, "--device", "tpu"],
        "cannot be read": [*good, "--text", workshop / "absent.txt"],
    }
    for message, arguments in cases.items():
        result = invoke(*arguments)
        assert (result.exit_code, result.stdout) == (2, ""), (message, result.output)
        assert message in result.stderr and result.stderr.count("\n") == 1, result.stderr
    assert not (tmp_path / "t").exists(), "refused before anything was written"


def test_command_with_random_weights_in_a_process_of_its_own(workshop: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sparsering.cli", "capture", "--model", workshop / "bare" / "config.json",
               "--random-weights", "--text", workshop / "a.txt", "--seq-len", "256", "--selector", "flex", "--p", "0.8",
               "--cap", "64", "--block-size", "64", "--layers", "1", "-o", tmp_path / "t"]  # fmt: skip
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    trace = Trace.open(tmp_path / "t")
    assert (trace.layers, trace.header.model.model_id) == ((1,), "bare (random weights)")
    assert trace.heads(0)[0].choice.settings == {
        "column_mass": 0.8, "slash_mass": 0.8, "column_cap": 64, "slash_cap": 64,
    }  # fmt: skip
    (tmp_path / "t" / "manifest.json").write_bytes(b"{")
    failed = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=200)
    assert failed.returncode == 2 and failed.stderr.count("\n") == 1
