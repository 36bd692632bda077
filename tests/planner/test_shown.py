"""What `plan` tells people: the answer and its certainty first, the pick marked, figures that agree with the plan's."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sparsering import cli
from sparsering.planner.plan import Plan, load_plan
from sparsering.planner.shown import memory_line, plan_answer
from sparsering.traces.synthetic import SyntheticSettings, write_synthetic_trace

SETTINGS = SyntheticSettings(seq_len_tokens=8192, block_size=128, heads=4, columns=70, density=0.1)


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Plan, list[str]]:
    """A plan for 16 GPUs, and the lines that were printed."""
    folder: Path = tmp_path_factory.mktemp("shown")
    write_synthetic_trace(folder / "trace", "skewed", SETTINGS, layers=6, kv_heads=2, head_dim=64)
    asked = ["plan", "--trace", str(folder / "trace"), "--cluster", "h100-nvlink-8", "-o", str(folder / "plan.json")]
    narrowed = ["--set", "gpus_per_node=16", "--layout", "gather", "--layout", "ring", "--placement", "striped"]
    result = CliRunner().invoke(cli.app, [*asked, *narrowed])
    assert result.exit_code == 0, result.output
    return load_plan(folder / "plan.json"), result.stdout.splitlines()


def test_the_first_line_answers_and_says_how_sure_it_is(planned: tuple[Plan, list[str]]) -> None:
    made, lines = planned
    told = made.predictions
    assert lines[0] == plan_answer(made)
    assert lines[0].startswith(told["verdict"])
    assert f"takes {told['step_time_us'] / 1e3:,.3f} ms" in lines[0]
    assert f"{told['best_baseline_us'] / 1e3:,.3f} ms with the best plain layout" in lines[0]
    assert "unvalidated: prices of h100-nvlink-8 are from data sheets" in lines[0]


def test_the_pick_is_marked_once_with_its_time(planned: tuple[Plan, list[str]]) -> None:
    made, lines = planned
    (marked,) = [line for line in lines if line.startswith("→")]
    assert f"{made.predictions['step_time_us'] / 1e3:,.3f}" in marked and "picked" in marked


def test_margins_follow_from_the_times_that_are_shown(planned: tuple[Plan, list[str]]) -> None:
    made, lines = planned
    told = made.predictions
    (plain,) = [line for line in lines if line.startswith("best plain layout: ")]
    share, way, ms = re.findall(r"takes ([\d.]+)% (less|more), ([\d.,]+) ms (?:less|more) over the 6 layers", plain)[0]
    saved_us = told["best_baseline_us"] - told["step_time_us"]
    assert way == ("less" if saved_us > 0 else "more")
    assert float(share) == pytest.approx(100 * abs(saved_us) / told["best_baseline_us"], abs=0.051)
    assert float(ms.replace(",", "")) == pytest.approx(6 * abs(saved_us) / 1e3, abs=0.001)
    assert any(line.startswith("lower bound: ") and "above it" in line for line in lines)
    assert any(line.startswith("runner-up: ") for line in lines)


def test_parts_of_the_memory_add_up_to_what_is_shown(planned: tuple[Plan, list[str]]) -> None:
    made, lines = planned
    told = made.predictions
    assert sum(told["memory_parts_bytes"].values()) == told["memory_bytes"]
    (line,) = [line for line in lines if line.startswith("memory of one layer on a GPU")]
    assert line == memory_line(told)
    total, *parts, limit = (int(number.replace(",", "")) for number in re.findall(r"([\d,]+) MB", line))
    assert total == sum(parts) == round(told["memory_bytes"] / 1e6)
    assert limit == round(told["memory_limit_bytes"] / 1e6)


def test_how_many_layers_were_looked_at_agrees_with_the_help(planned: tuple[Plan, list[str]]) -> None:
    made, lines = planned
    assert len(made.predictions["sampled_layers"]) == 2
    first = "note: times are means over 2 of 6 recorded layers"
    assert f"{first}: 4 were read, on 16 GPUs fewer are played" in lines
    told = " ".join(CliRunner().invoke(cli.app, ["plan", "--help"]).stdout.split())
    assert "default: four, spread. The simulator takes as many of them as 32 divided by the cluster's GPUs" in told
