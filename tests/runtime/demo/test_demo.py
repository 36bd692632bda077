"""`sparsering demo` from the outside, on a short sequence: every file, verified, small, and a page that opens."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from browser import drawn, opened
from sparsering.cli import app
from sparsering.planner.plan import load_plan
from sparsering.runtime.demo.folder import CONTENT, KIND, replaced_folder
from sparsering.runtime.demo.model import standard_library_bytes
from sparsering.traces.dataset.store import Trace
from sparsering.traces.errors import InputError
from sparsering.traces.timeline import COMPUTE_STREAM, Timeline

RUNNER = CliRunner()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Run the demo once, short, and return its folder and what it printed."""
    folder = tmp_path_factory.mktemp("demo") / "out"
    arguments = ["demo", "-o", str(folder), "--seq-len", "1024", "--train-seconds", "2", "--seed", "3", "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "sparsering.cli", *arguments], capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("✓") == 8, done.stderr
    return folder, json.loads(done.stdout)


@pytest.mark.slow
def test_the_demo_writes_these_files_and_no_others(made):
    folder, _ = made
    assert sorted(path.name for path in folder.iterdir()) == sorted(CONTENT)
    assert [path.name for path in folder.parent.iterdir()] == ["out"], "nothing is left beside the folder"


@pytest.mark.slow
def test_the_trace_is_small_real_and_whole(made):
    trace = Trace.open(made[0] / "trace")
    trace.verify()
    assert sum(path.stat().st_size for path in trace.folder.iterdir()) < 1_000_000
    assert (trace.header.origin, trace.header.seq_len_tokens, trace.header.model.kv_heads) == ("real", 1024, 2)


@pytest.mark.slow
def test_the_run_is_verified_on_every_rank(made):
    folder, printed = made
    metrics = json.loads((folder / "metrics.json").read_text())
    assert printed["verified"] is metrics["verified"] is True
    checked = Counter(one["name"] for one in metrics["verification"])
    assert checked == dict.fromkeys(["out", "lse", "dq", "dk", "dv"], 4)
    assert all(one["error"] <= 1e-8 for one in metrics["verification"])


@pytest.mark.slow
def test_plans_and_timelines_belong_together(made):
    folder, _ = made
    cluster, local = load_plan(folder / "plan-a100x32.json"), load_plan(folder / "plan-local4.json")
    assert (cluster.world_size, local.world_size) == (32, 4)
    assert cluster.pattern.trace_sha256 == local.pattern.trace_sha256 == Trace.open(folder / "trace").digest()
    timelines = [Timeline.load(folder / f"timeline-{name}.json.gz") for name in ("simulated", "measured")]
    assert [timeline.source for timeline in timelines] == ["simulated", "measured"]
    assert {timeline.metadata["plan_digest"] for timeline in timelines} == {local.digest}
    transfers = [
        Counter((span.rank, span.direction, span.phase, span.stream) for span in timeline.spans if is_transfer(span))
        for timeline in timelines
    ]
    assert transfers[0] == transfers[1], "the same calls in the same phases on the same streams"


def is_transfer(span: Any) -> bool:
    return span.stream != COMPUTE_STREAM


@pytest.mark.slow
def test_the_run_can_be_repeated_from_the_folder(made, tmp_path: Path):
    folder, _ = made
    done = RUNNER.invoke(app, ["simulate", str(folder / "plan-local4.json"), "--cluster", "local-cpu-4", "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["layer"] == json.loads((folder / "metrics.json").read_text())["layer"]


class Links(HTMLParser):
    """Collects everything that a browser would fetch, and the text of the first verdict."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.scripts = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.scripts += tag == "script"
        wanted = {"src", "srcset", "href", "data", "action", "poster"}
        self.fetched += [value or "" for name, value in attrs if name in wanted]


@pytest.mark.slow
def test_the_report_asks_nobody_and_says_what_planning_gains(made):
    folder, _ = made
    page = (folder / "report.html").read_text()
    links = Links()
    links.feed(page)
    assert [link for link in links.fetched if not link.startswith("data:")] == []
    assert len(page) < 8_000_000
    verdict = load_plan(folder / "plan-a100x32.json").predictions["verdict"]
    assert verdict[1:] in page


@pytest.mark.slow
def test_the_report_opens_in_a_browser(made, tmp_path: Path):
    document = opened(made[0] / "report.html", tmp_path)
    # Masks; the work of both plans, before and after; the simulated timeline above the measured one.
    for name in ("masks-1-1", "load-1-1", "load-1-4", "load-2-1", "load-2-4", "timeline-1-1", "timeline-1-2"):
        assert "main-svg" in drawn(document, name), f"{name} was not drawn"
    assert document.count('class="bar plan"') == document.count('class="bar baseline"') == 1


@pytest.mark.slow
def test_an_earlier_demo_is_replaced(made):
    with replaced_folder(made[0].parent / "out") as working:
        shutil.copytree(made[0], working, dirs_exist_ok=True)
        (working / "metrics.json").write_text(json.dumps({"kind": KIND, "second": True}))
    try:
        assert json.loads((made[0] / "metrics.json").read_text())["second"]
    finally:
        (made[0] / "metrics.json").write_text(json.dumps(made[1] | {"kind": KIND}))


def ours(folder: Path) -> Path:
    folder.mkdir()
    (folder / "metrics.json").write_text(json.dumps({"kind": KIND}))
    return folder


def test_a_failed_demo_leaves_the_earlier_one(tmp_path: Path):
    folder = ours(tmp_path / "out")
    with pytest.raises(RuntimeError, match="midway"), replaced_folder(folder) as working:
        (working / "metrics.json").write_text("{}")
        raise RuntimeError("midway")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert json.loads((folder / "metrics.json").read_text()) == {"kind": KIND}


@pytest.mark.parametrize("kind", ["foreign file", "foreign metrics", "no metrics", "a file", "a link"])
def test_what_the_demo_did_not_write_is_refused_in_one_line(kind: str, tmp_path: Path):
    folder = tmp_path / "out"
    if kind == "a file":
        folder.write_text("mine")
    elif kind == "a link":
        folder.symlink_to(ours(tmp_path / "elsewhere"))
    elif kind == "no metrics":
        folder.mkdir()
        (folder / "report.html").write_text("mine")
    elif kind == "foreign metrics":
        folder.mkdir()
        (folder / "metrics.json").write_text('{"accuracy": 0.9}')
    else:
        (ours(folder) / "thesis.tex").write_text("mine")
    before = sorted(path.name for path in tmp_path.rglob("*"))
    result = RUNNER.invoke(app, ["demo", "-o", str(folder)])
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1 and str(folder) in result.stderr
    assert sorted(path.name for path in tmp_path.rglob("*")) == before


def test_a_length_of_broken_blocks_is_refused(tmp_path: Path):
    result = RUNNER.invoke(app, ["demo", "-o", str(tmp_path / "out"), "--seq-len", "1100"])
    assert result.exit_code == 2
    assert "1100" in result.stderr and result.stderr.count("\n") == 1


def test_the_sample_text_is_python_and_the_same_every_time():
    text = standard_library_bytes(at_least_bytes=100_000)
    assert len(text) >= 100_000
    assert text == standard_library_bytes(at_least_bytes=100_000)
    assert text.count(b"\ndef ") + text.count(b"\n    def ") > 50


def test_a_python_without_sources_is_said(tmp_path: Path):
    (tmp_path / "one.py").write_text("x = 1\n")
    with pytest.raises(InputError, match="7 bytes of Python sources"):
        standard_library_bytes(at_least_bytes=100, folder=tmp_path)
