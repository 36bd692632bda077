"""`sparsering report` from the outside: what it knows, what it says first, what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from report_files import (
    DENSE,
    called,
    invoke,
    write_cluster,
    write_everything,
    write_metrics,
    write_plan,
    write_timelines,
    write_trace,
)  # fmt: skip
from sparsering.planner.cost.cluster import load_cluster
from sparsering.planner.plan import load_plan
from sparsering.simulator.report.inputs import read_inputs
from sparsering.simulator.report.spread import spread_loads
from sparsering.traces.dataset.store import Trace


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files that no test changes."""
    return write_everything(tmp_path_factory.mktemp("files"))


def told(folder: Path, *paths: Path) -> dict[str, Any]:
    return json.loads(called("report", *paths, "-o", folder / "report.html", "--json"))


def test_everything_is_known_whatever_its_name(made: Path, tmp_path: Path) -> None:
    for number, path in enumerate(sorted(path for path in made.iterdir() if path.is_file())):
        (tmp_path / f"file-{number}").write_bytes(path.read_bytes())
    found = told(tmp_path, tmp_path, made / "masks", made / "trace", made / "planned", made / "dense")
    assert found["parts"] == [
        "layouts", "waterfall", "masks", "load", "timelines", "fidelity", "training", "evaluation", "plans", "results",
    ]  # fmt: skip
    assert found["helps"] == "yes"


def test_the_terminal_says_what_the_page_says_first(made: Path, tmp_path: Path) -> None:
    sentence = told(tmp_path, made)["sentence"]
    printed = " ".join(called("report", made, "-o", tmp_path / "report.html").split())
    assert printed.startswith(sentence)
    assert printed.endswith(f"report: {tmp_path / 'report.html'}")
    page = (tmp_path / "report.html").read_text().replace("\u00a0", " ")
    assert f'<p class="verdict">{sentence}</p>' in page


def test_the_answer_names_gain_baseline_run_and_error(made: Path, tmp_path: Path) -> None:
    plan = load_plan(made / "plan.json")
    predicted = plan.predictions
    saved = 1 - predicted["step_time_us"] / predicted["best_baseline_us"]
    found = told(tmp_path, made)
    assert found["saved_share"] == pytest.approx(saved)
    sentence = found["sentence"]
    assert sentence.startswith(f"Planning helps: on 4 GPUs (2-by-2) the attention of a step takes {saved:.0%}"[:-1])
    assert predicted["best_baseline"] in sentence
    attention_us = (376.595646 + 294.685395) * 1e3
    more_us = attention_us * (predicted["best_baseline_us"] / predicted["step_time_us"] - 1)
    hours = more_us * 1000 * 4 / 3.6e9  # run.yaml says how many steps
    assert f"the training run “planned” {more_us / (1095458.74 + more_us):.0%}"[:-1] in sentence
    assert f"({hours:,.3g} GPU-hours in 1,000 steps)" in sentence
    assert "where the plan was measured its simulated step was" in sentence


def test_without_measurements_it_is_not_validated(made: Path, tmp_path: Path) -> None:
    found = told(tmp_path, made / "plan.json")
    assert found["parts"] == ["layouts"]
    assert found["sentence"].endswith("this is predicted from data sheets and not validated on such a cluster.")


def test_an_error_larger_than_the_gain_makes_a_maybe(made: Path, tmp_path: Path) -> None:
    write_timelines(tmp_path, made / "plan.json", made / "masks", made / "cluster.yaml", slower=2.0)
    found = told(tmp_path, tmp_path, made / "plan.json")
    assert found["helps"] == "maybe"
    assert found["sentence"].startswith("Planning may help: ")
    assert found["sentence"].endswith("which is more than the gain: it may be none.")


def test_other_predictions_do_not_validate_a_plan(made: Path, tmp_path: Path) -> None:
    found = told(tmp_path, made / "plan.json", made / "validated.json")
    assert "not validated on such a cluster (the one prediction measured in these files was " in found["sentence"]
    assert found["parts"] == ["layouts", "fidelity"]


def test_no_gain_is_said_plainly_with_the_layout_to_use(tmp_path: Path) -> None:
    cluster = write_cluster(tmp_path / "cluster.yaml", preset="local-cpu-4", nodes=1, gpus=4, origin="measured")
    trace = write_trace(tmp_path / "trace", "vertical-slash", columns=64)
    options = ("--dtype", "float32", "--backend", "blockwise")
    plan = load_plan(write_plan(tmp_path / "plan.json", trace, cluster, *options))
    found = told(tmp_path, tmp_path)
    assert found["helps"] == "no"
    assert found["sentence"].startswith("Planning does not help: on 4 GPUs (1-by-4)")
    assert f"“{plan.predictions['best_baseline']}”: use that one" in found["sentence"]
    assert "prices that were measured on that cluster" in found["sentence"]


def test_what_cannot_be_known_is_said(made: Path, tmp_path: Path) -> None:
    trace = told(tmp_path, made / "masks")
    assert (trace["helps"], trace["parts"]) == ("unknown", ["masks"])
    assert trace["sentence"].startswith("Whether planning helps is not known yet: here are a trace")
    runs = told(tmp_path, made / "planned", made / "dense")
    assert runs["parts"] == ["training"]
    assert "3.12 times the speed of dense attention" in runs["sentence"]


def test_a_measured_gain_needs_the_same_ranks(tmp_path: Path) -> None:
    write_metrics(tmp_path / "planned", ranks=2)
    write_metrics(tmp_path / "dense", ranks=1, **DENSE)
    assert told(tmp_path, tmp_path)["sentence"].startswith("Whether planning helps is not known")


def test_a_page_is_made_again_in_its_place_and_nothing_else_is(made: Path, tmp_path: Path) -> None:
    page, mine = tmp_path / "report.html", tmp_path / "mine.html"
    called("report", made / "plan.json", "-o", page)
    called("report", made / "plan.json", page, "-o", page)
    mine.write_text("<p>mine</p>")
    assert invoke("report", made / "plan.json", "-o", mine).exit_code == 2
    assert mine.read_text() == "<p>mine</p>"


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("notes.txt", b"mine", "1 files, none of them a trace, plan, timeline"),
        ("cut.json.gz", b"\x1f\x8b\x08", "1 files, none of them"),
        ("rank-00000.jsonl", b'{"rank": 0, "step": 0, "step_time_us": -1, "tokens_per_s": 1}\n', "step_time_us"),
        ("v.json", b'{"quantities": {"step": {"errors": {"rows": "x"}}}, "phases": [], "missed": []}', "rows"),
    ],
)
def test_nothing_known_and_damaged_files_are_one_line(
    name: str, content: bytes, complaint: str, tmp_path: Path
) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    (folder / name).write_bytes(content)
    result = invoke("report", folder, "-o", tmp_path / "report.html")
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1), result.output
    assert complaint in result.stderr
    assert not (tmp_path / "report.html").exists()


def test_broken_json_is_not_read_as_yaml(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """YAML's parser takes long for what JSON's refuses at once."""
    cluster = json.dumps(yaml.safe_load((made / "cluster.yaml").read_text()))
    (tmp_path / "flow.yaml").write_text(cluster[:-1] + ", }")  # YAML, and no JSON
    assert len(read_inputs([tmp_path / "flow.yaml"]).clusters) == 1
    monkeypatch.setattr("sparsering.simulator.report.inputs.read_yaml", None)
    (tmp_path / "plan.json").write_text((made / "plan.json").read_text()[:-9])
    assert read_inputs([made / "plan.json", tmp_path / "plan.json"]).unknown == [tmp_path / "plan.json"]


def test_wrong_paths_are_one_line(made: Path, tmp_path: Path) -> None:
    for arguments in (
        (tmp_path / "nowhere", "-o", tmp_path / "r.html"),
        (made / "plan.json", "-o", tmp_path / "report.txt"),
        (made / "plan.json", "-o", tmp_path),
    ):
        result = invoke("report", *arguments)
        assert (result.exit_code, result.stderr.count("\n")) == (2, 1), result.output
    assert list(tmp_path.iterdir()) == []


def test_an_altered_plan_is_refused(made: Path, tmp_path: Path) -> None:
    document = json.loads((made / "plan.json").read_text())
    document["predictions"]["step_time_us"] /= 2
    (tmp_path / "plan.json").write_text(json.dumps(document))
    result = invoke("report", tmp_path, "-o", tmp_path / "report.html")
    assert result.exit_code == 2 and "does not match" in result.stderr


def test_no_torch_is_imported(made: Path, tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['torch'] = None\nfrom sparsering.cli import main\n"
        f"sys.argv = ['sparsering', 'report', {str(made)!r}, '-o', {str(tmp_path / 'r.html')!r}]\nmain()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_the_baseline_is_simulated_as_the_search_did(tmp_path: Path) -> None:
    """Half of the ranks own no tokens: what they would send is left out of the baseline as of the plan."""
    cluster = write_cluster(tmp_path / "cluster.yaml", nodes=2, gpus=4)
    trace = write_trace(tmp_path / "trace", "dense", tokens=256)
    plan = load_plan(write_plan(tmp_path / "plan.json", trace, cluster, "--evaluator", "simulator"))
    assert plan.pairs is not None
    loads = spread_loads(plan, Trace.open(trace).layer_pattern(0, 0), layer=0, cluster=load_cluster(cluster))
    found = {one.role: one.step_time_us for one in loads}
    told = plan.predictions
    assert found["baseline"] == pytest.approx(told["best_baseline_us"], abs=1e-3)
    assert found["plan"] == pytest.approx(told["step_time_us"], abs=1e-3)
