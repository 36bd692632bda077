"""Every verb asks the same gate."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoConfig
from typer.testing import CliRunner

from model_cases import CASES, case_config
from rank_pool import RankFailure, RankPool
from sparsering import cli
from sparsering.runtime.audit.proof import TOLERANCE
from train_runs import write_run


def _one_line(arguments: list[str]) -> str:
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 2, (result.output, result.exception)
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


@pytest.mark.parametrize("name", ["lfm2", "cpmant", "llama-dynamic", "llama4-temperature", "qwen3.5"])
def test_capture_attach_and_train_refuse_alike(
    name: str, tmp_path: Path, rank_pools: Callable[[int], RankPool]
) -> None:
    refusal = CASES[name][2]
    assert refusal is not None
    text = tmp_path / "text.txt"
    text.write_text("ring " * 100)
    folder = tmp_path / "model"
    case_config(name).save_pretrained(folder)
    asked = ["capture", "--model", str(folder), "--random-weights", "--text", str(text), "--seq-len", "256"]
    captured = _one_line([*asked, "-o", str(tmp_path / "trace")])
    write_run(tmp_path / "run")
    run = (tmp_path / "run/config.yaml").read_text().replace(str(tmp_path / "run/model"), str(folder))
    (tmp_path / "run/config.yaml").write_text(run)
    trained = _one_line(["train", str(tmp_path / "run/config.yaml"), "--dry-run"])
    shown = _one_line(["audit", str(folder), "--seq-len", "256"])
    with pytest.raises(RankFailure) as caught:
        rank_pools(2).run("attach_case", name=name)
    for told in (captured, trained, shown, str(caught.value)):
        assert re.search(refusal, told), told
    assert captured == trained == shown
    assert not (tmp_path / "trace").exists()


def test_the_verb_shows_a_right_model(tmp_path: Path) -> None:
    case_config("granite").save_pretrained(tmp_path)
    told = CliRunner().invoke(cli.app, ["audit", str(tmp_path), "--seq-len", "256"])
    assert told.exit_code == 0 and told.stdout.startswith("right: GraniteForCausalLM at 256 tokens"), told.output
    shown = json.loads(CliRunner().invoke(cli.app, ["audit", str(tmp_path), "--seq-len", "256", "--json"]).stdout)
    assert shown["right"] and shown["errors"]["train"]["gradient"] < TOLERANCE
    case_config("head-dim-96").save_pretrained(tmp_path / "96")
    told = CliRunner().invoke(cli.app, ["audit", str(tmp_path / "96"), "--seq-len", "256"]).stdout
    assert "triton padded to 128" in told and "flash4 no" in told and "blockwise yes" in told


def test_what_is_no_causal_model_is_one_line(tmp_path: Path) -> None:
    AutoConfig.for_model("vit").save_pretrained(tmp_path)
    assert "model_type: 'vit' is no causal language model" in _one_line(["audit", str(tmp_path)])
    assert "none/config.json: no such file" in _one_line(["audit", str(tmp_path / "none/config.json")])
