"""`sparsering train --init`: a configuration that a dry run accepts as it is; `--set` changes single values."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from sparsering import cli
from sparsering.runtime.data.writer import byte_tokenizer, write_data
from sparsering.traces.yaml_files import read_yaml
from train_runs import write_model, write_text


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model's configuration, data, and the file that was written for them."""
    folder = tmp_path_factory.mktemp("starter")
    write_model(folder / "model", max_position_embeddings=1000)
    write_data([write_text(folder / "text")], folder / "data", byte_tokenizer())
    made = train("--init", str(folder / "model"), "--data", str(folder / "data"), "-o", str(folder / "first.yaml"))
    assert made.exit_code == 0, made.output
    return folder


def train(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, ["train", *arguments])


def test_a_dry_run_accepts_it_as_it_is(folder: Path) -> None:
    shown = train(str(folder / "first.yaml"), "--dry-run", "--json")
    assert shown.exit_code == 0, shown.output
    configuration = json.loads(shown.stdout)["configuration"]
    assert configuration["seq_len_tokens"] == 512, "what the model was made for, rounded down"
    assert configuration["model"] == {"path": str(folder / "model"), "random_weights": True, "rope_parameters": None}
    assert configuration["attention"] == "planned"
    document = read_yaml(folder / "first.yaml", max_bytes=1 << 16)
    assert document["model"]["path"] == "model", "the folder can be moved"
    assert (folder / "first.yaml").read_text().count("#") > 10, "every choice is explained"


def test_values_can_be_set_without_an_editor(folder: Path) -> None:
    settings = ("--set", "optimizer.learning_rate=0.5", "--set", "parallel={data: 2, context: 2}")
    shown = train(str(folder / "first.yaml"), "--dry-run", "--json", *settings)
    assert shown.exit_code == 0, shown.output
    summary = json.loads(shown.stdout)
    assert summary["configuration"]["optimizer"]["learning_rate"] == 0.5
    assert summary["tokens_per_step"] == 2 * 512
    wrong = train(str(folder / "first.yaml"), "--dry-run", "--set", "optimizer.lerning_rate=0.5")
    assert wrong.exit_code == 2
    assert "optimizer.lerning_rate: " in wrong.stderr and "did you mean 'learning_rate'?" in wrong.stderr


def test_nothing_is_overwritten_and_nothing_is_left(folder: Path, tmp_path: Path) -> None:
    before = (folder / "first.yaml").read_bytes()
    again = train("--init", str(folder / "model"), "--data", str(folder / "data"), "-o", str(folder / "first.yaml"))
    assert again.exit_code == 2 and "exists: it is not overwritten" in again.stderr
    assert (folder / "first.yaml").read_bytes() == before
    write_model(tmp_path / "narrow", vocab_size=16)
    refused = train("--init", str(tmp_path / "narrow"), "--data", str(folder / "data"), "-o", str(tmp_path / "a.yaml"))
    assert refused.exit_code == 2 and "vocabulary" in refused.stderr
    missing = train("--init", str(folder / "model"), "--data", str(tmp_path / "no"), "-o", str(tmp_path / "a.yaml"))
    assert missing.exit_code == 2 and "is no data folder" in missing.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"narrow"}
    neither = train()
    assert neither.exit_code == 2 and "--init MODEL_FOLDER" in neither.stderr
