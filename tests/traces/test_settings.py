"""`--set section.key=value`: values as YAML reads them, in the place of a file's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from sparsering import cli
from sparsering.planner.cost.cluster import load_cluster
from sparsering.traces.errors import InputError
from sparsering.traces.synthetic import SyntheticSettings, write_synthetic_trace
from sparsering.traces.yaml_files import with_settings

FILE = Path("config.yaml")


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("a.b=2", {"a": {"b": 2, "c": 1}, "d": "x"}),
        ("a.b=1e-3", {"a": {"b": 0.001, "c": 1}, "d": "x"}),
        ("d=", {"a": {"c": 1}, "d": None}),
        ("d=a=b", {"a": {"c": 1}, "d": "a=b"}),
        ("e.f.g=true", {"a": {"c": 1}, "d": "x", "e": {"f": {"g": True}}}),
        ("a={b: [1, two]}", {"a": {"b": [1, "two"]}, "d": "x"}),
    ],
)
def test_values_are_set(setting: str, expected: dict[str, Any]) -> None:
    document = {"a": {"c": 1}, "d": "x"}
    assert with_settings(document, [setting], source=FILE) == expected
    assert document == {"a": {"c": 1}, "d": "x"}, "what was read stays as it is"


def test_later_settings_win() -> None:
    assert with_settings(None, ["a.b=1", "a.c=2", "a.b=3"], source=FILE) == {"a": {"b": 3, "c": 2}}


@pytest.mark.parametrize(
    ("setting", "problem"),
    [
        ("a", "--set: 'a' is not of the form section.key=value"),
        ("=1", "--set: '=1' is not of the form section.key=value"),
        ("a..b=1", "--set: 'a..b=1' is not of the form section.key=value"),
        ("d.e=1", "config.yaml: --set: 'x' is no mapping that could hold 'e'"),
        ("a.b={", "--set a.b: line 1: is not valid YAML"),
        ("a.b=&x 1", "--set a.b: line 1: anchors and aliases are not read"),
    ],
)
def test_refusals_name_the_setting(setting: str, problem: str) -> None:
    with pytest.raises(InputError) as refused:
        with_settings({"a": {"c": 1}, "d": "x"}, [setting], source=FILE)
    assert str(refused.value).startswith(problem)


def test_a_cluster_is_changed_and_checked_as_its_file_is() -> None:
    plain, changed = load_cluster("a100-nvlink-8"), load_cluster("a100-nvlink-8", ["gpu.memory_bytes=80_000_000_000"])
    assert changed.gpu.memory_bytes == 80_000_000_000
    assert changed.model_copy(update={"gpu": plain.gpu}) == plain
    with pytest.raises(InputError, match=r"gpu\.multiprocesors: .* did you mean 'multiprocessors'"):
        load_cluster("a100-nvlink-8", ["gpu.multiprocesors=4"])
    with pytest.raises(InputError, match=r"gpu\.memory_bytes"):
        load_cluster("a100-nvlink-8", ["gpu.memory_bytes=-1"])


def test_a_plan_is_made_for_the_changed_cluster(tmp_path: Path) -> None:
    settings = SyntheticSettings(seq_len_tokens=2048, block_size=128, heads=2, columns=16, density=0.2)
    write_synthetic_trace(tmp_path / "trace", "vertical-slash", settings, kv_heads=1, head_dim=16)
    asked = ["plan", "--trace", str(tmp_path / "trace"), "--cluster", "local-cpu-4", "-o", str(tmp_path / "plan.json")]
    quick = ["--layout", "ring", "--placement", "striped", "--evaluator", "recurrence"]
    small = CliRunner().invoke(cli.app, [*asked, *quick, "--set", "gpu.memory_bytes=1000"])
    assert small.exit_code == 2
    assert "memory_limit_bytes: 500 is too little for any candidate" in small.stderr
    fine = CliRunner().invoke(cli.app, [*asked, *quick, "--set", "gpu.memory_bytes=1e10", "--set", "gpus_per_node=2"])
    assert fine.exit_code == 0, fine.output
    assert "on 2 ranks" in fine.stdout
    simulated = ["simulate", str(tmp_path / "plan.json"), "--cluster", "local-cpu-4"]
    played = CliRunner().invoke(cli.app, [*simulated, "--set", "origin=datasheet"])
    assert played.exit_code == 0, played.output
    assert "unvalidated" in played.stdout
