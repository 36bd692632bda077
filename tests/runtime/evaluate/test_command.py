"""The verb `sparsering eval`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from eval_cases import byte_data, byte_model
from sparsering import cli
from sparsering.planner.layouts.ring import Ring
from sparsering.planner.plan import make_plan
from sparsering.planner.schedule.placement import striped
from sparsering.planner.specs import AttentionSpec, KernelSpec, PatternSpec
from sparsering.runtime.evaluate.result import read_evaluation
from sparsering.runtime.model.shape import model_shape
from sparsering.runtime.pattern.selectors import make_selector, pattern_chosen_by

SHORT = ["--seq-len", "512", "--sequences", "2", "--cut-context", "128", "--block-size", "64"]


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and held-out data."""
    folder = tmp_path_factory.mktemp("workshop")
    byte_model().save_pretrained(folder / "model")
    byte_data(folder / "heldout")
    (folder / "patterns.yaml").write_text("selector: dense\nlayers:\n  - {layers: '1', selector: sink-window}\n")
    return folder


def invoke(workshop: Path, output: Path, *arguments: str | Path):
    given = ["eval", "--model", workshop / "model", "--data", workshop / "heldout/data", "-o", output, *arguments]
    return CliRunner().invoke(cli.app, [str(one) for one in given])


def write_plan(path: Path, pattern: PatternSpec) -> Path:
    plan = make_plan(
        attention=AttentionSpec(model=model_shape(byte_model().config), seq_len_tokens=512, block_size=64,
                                dtype="float32", columns_capacity=0),
        placement=striped(seq_len_tokens=512, world_size=2, granularity_tokens=64), forward=Ring(), pattern=pattern,
        kernels=KernelSpec.model_validate({"backend": "blockwise"}),
    )  # fmt: skip
    plan.save(path)
    return path


def test_a_user_evaluates_from_a_shell(workshop: Path, tmp_path: Path):
    command = [sys.executable, "-m", "sparsering", "eval", "--model", workshop / "model", "--data",
               workshop / "heldout/data", "-o", tmp_path / "eval.json", *SHORT, "--json", "--selector", "sink-window",
               "--window", "64"]  # fmt: skip
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env={**os.environ}, timeout=120)
    assert done.returncode == 0, done.stderr
    row, result = json.loads(done.stdout), read_evaluation(tmp_path / "eval.json")
    assert row == result.row()
    assert (row["arm"], row["selector"], row["seq_len"], row["needle_last"]) == (
        "sink-window",
        "sink-window",
        512,
        None,
    )
    assert row["heldout_loss"] != row["heldout_loss_dense"]


def test_patterns_come_from_options_files_and_plans(workshop: Path, tmp_path: Path):
    arguments = [*SHORT, "--tasks", "loss"]
    plan = write_plan(tmp_path / "plan.json", pattern_chosen_by(make_selector("sink-window", {"window_tokens": 64})))
    ways = {
        "dense": [], "by layer": ["--patterns", workshop / "patterns.yaml"], "sink-window": ["--plan", plan],
        "moba-block": ["--selector", "moba-block", "--chunk", "128", "--top-chunks", "1", "--name", "m"],
    }  # fmt: skip
    found, said = {}, ""
    for name, way in ways.items():
        done = invoke(workshop, tmp_path / f"{name}.json", *arguments, *way)
        assert done.exit_code == 0, done.output
        found[name], said = read_evaluation(tmp_path / f"{name}.json"), done.stdout
    assert [one.selector for one in found.values()] == [None, "by layer", "sink-window", "moba-block"]
    assert found["sink-window"].selector_settings == {"sink_tokens": 30, "window_tokens": 64}
    assert found["moba-block"].arm == "m"
    dense = found["dense"].heldout_loss
    assert all(one.heldout_loss_dense == pytest.approx(dense, abs=1e-6) for one in found.values())
    assert "cut loss" in said and "density, columns counted" in said


def test_a_page_is_written_of_everything(workshop: Path, tmp_path: Path):
    """What the verb writes is what the report reads, every task among it."""
    page, output = tmp_path / "page.html", tmp_path / "eval.json"
    everything = [
        "--tasks", "loss,agreement,reach,needle,tracking,aggregation", "--seq-len", "1024", "--sequences", "2",
        "--cut-context", "256", "--block-size", "64", "--lengths", "1024", "--needles", "4", "--keys", "2",
        "--depths", "2", "--selector", "sink-window", "--window", "64", "--report", page,
    ]  # fmt: skip
    done = invoke(workshop, output, *everything)
    assert done.exit_code == 0, done.output
    assert "needle × 4, 1,024 tokens, question last, sparse: 0 of 4" in done.stdout
    assert f"report: {page}" in done.stdout
    text = page.read_text()
    for figure in ("loss", "cut_minus_whole", "kl", "needle-4-mid-sparse"):
        assert f'data-figure="figure-eval-0-{figure}"' in text
    assert "most frequent word" in text


def test_rope_parameters_take_the_place_of_the_models(workshop: Path, tmp_path: Path):
    (tmp_path / "rope.yaml").write_text("rope_type: default\nrope_theta: 100.0\n")
    losses = []
    for number, way in enumerate(([], ["{rope_type: default, rope_theta: 100.0}"], [str(tmp_path / "rope.yaml")])):
        output = tmp_path / f"{number}.json"
        done = invoke(workshop, output, *SHORT, *(["--rope-parameters", *way] if way else []))
        assert done.exit_code == 0, done.output
        losses.append(read_evaluation(output).heldout_loss)
    assert losses[0] != losses[1] and losses[1] == losses[2]


def test_what_cannot_be_is_one_line(workshop: Path, tmp_path: Path):
    (tmp_path / "other.json").write_text('{"mine": 1}')
    (tmp_path / "list.yaml").write_text("- 1\n")
    replaying = write_plan(tmp_path / "replay.json", PatternSpec(source="trace", trace_sha256="0" * 64))
    plan = write_plan(tmp_path / "plan.json", pattern_chosen_by(make_selector("sink-window")))
    cases = {
        "no such file": ["--model", workshop / "absent"],
        "holds no safetensors weights": ["--model", workshop / "heldout/texts/../../model/config.json", "--model",
                                         tmp_path / "bare"],
        "is no data folder": ["--data", workshop],
        "'los' is not one of": ["--tasks", "los"],
        "--window: is a selector's: give --selector": ["--window", "64"],
        "--selector: comes from": ["--patterns", workshop / "patterns.yaml", "--selector", "flex"],
        "cannot be given beside --plan": ["--patterns", workshop / "patterns.yaml", "--plan", plan],
        "replays a trace": ["--plan", replaying],
        "--block-size: is 128, the plan's is 64": ["--plan", plan, "--block-size", "128"],
        "--block-size: is 100": ["--block-size", "100"],
        "--apart: keeps documents apart: give --documents": ["--apart"],
        "--no-dense-too: leaves nothing": ["--no-dense-too"],
        "give a selector": ["--tasks", "agreement"],
        "--needles: '1,x' is no list": ["--needles", "1,x"],
        "holds 18 of 512 tokens": ["--sequences", "99"],
        "rope_type: 'lin' is not one of": ["--rope-parameters", "{rope_type: lin}"],
        "--rope-parameters: is no mapping": ["--rope-parameters", tmp_path / "list.yaml"],
        "exists and is no evaluation": ["-o", tmp_path / "other.json"],
        "must end in .html": ["--report", tmp_path / "page.txt"],
        "device: 'tpu' is": ["--device", "tpu"],
    }  # fmt: skip
    (tmp_path / "bare").mkdir()
    byte_model().config.save_pretrained(tmp_path / "bare")
    for message, arguments in cases.items():
        own = [one for one in SHORT if not ("--plan" in arguments and one in ("--block-size", "64"))]
        done = invoke(workshop, tmp_path / "out.json", *own, *arguments)
        assert (done.exit_code, done.stdout) == (2, ""), (message, done.output)
        assert message in done.stderr and done.stderr.count("\n") == 1, (message, done.stderr)
    assert not (tmp_path / "out.json").exists()
