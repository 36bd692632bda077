"""Small files that ask for much, files that never end, and what a terminal would obey: one line, exit code 2."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from formats import FORMATS_BY_NAME as FORMATS
from report_files import invoke
from sparsering.planner.cost.cluster import load_cluster
from sparsering.planner.layouts.registry import make_layout
from sparsering.planner.plan import load_plan, make_plan
from sparsering.planner.schedule.placement import striped
from sparsering.planner.specs import AttentionSpec, KernelSpec, ModelShape, PatternSpec
from sparsering.traces.errors import CONTROL, InputError
from sparsering.traces.output import Table, say, show
from sparsering.traces.published import read_published
from sparsering.traces.timeline import Timeline

READERS = (
    "check {}", "simulate {} --cluster local-cpu-4", "run {}", "compare {} {}", "validate {}", "export {} -o out",
    "plan --trace sample:real-135m --cluster {} -o new.json", "cluster --base local-cpu-4 --topology {} -o new.yaml",
    "cluster --base local-cpu-4 --nccl-tests {} -o new.yaml", "train {}", "estimate {} --cluster local-cpu-4",
    "plan --trace sample:real-135m --cluster local-cpu-4 --launches {} -o new.json", "data {} -o out",
    "capture --model {} --text {} -o out", "audit {}", "report {} -o new.html",
)  # fmt: skip


@pytest.mark.parametrize("line", READERS, ids=lambda line: line.partition("{}")[0])
def test_no_verb_waits_for_a_pipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe.json")
    result = invoke(*line.replace("{}", "pipe.json").split())
    assert result.exit_code == 2, result.output
    assert result.stdout == "" and result.stderr.count("\n") == 1 and "pipe.json" in result.stderr
    assert os.listdir() == ["pipe.json"]


def changed_timeline(tmp_path: Path, **changes: Any) -> Path:
    path = FORMATS["timeline"].make(tmp_path)
    document = json.loads(path.read_text())
    header = {name: changes.pop(name) for name in ("world_size",) if name in changes}
    document["otherData"] |= header
    next(event for event in document["traceEvents"] if event["ph"] == "X")["args"] |= changes
    path.write_text(json.dumps(document))
    return path


def test_a_timeline_cannot_ask_for_gigabytes(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="from 0 to 16384 is expected, not 1000000000"):
        Timeline.load(changed_timeline(tmp_path / "a", phase=10**9))
    with pytest.raises(InputError, match="16384 ranks × 16001 phases are more than the 4194304 that are read"):
        Timeline.load(changed_timeline(tmp_path / "b", phase=16000, world_size=16384))


def test_published_settings_of_many_keys_are_refused_at_once(tmp_path: Path) -> None:
    path = tmp_path / "settings.json"
    path.write_text(json.dumps([{str(head): ["vertical_and_slash", 1, 1, 0.5] for head in range(100_000)}]))
    with pytest.raises(InputError, match="layer 0: has 100000 heads; at most 4096 are read"):
        read_published(path)
    pairs = ", ".join(f'"{number}": 1' for number in range(100_000))
    path.write_text(f'[{{{pairs}, "7": 1}}]')
    with pytest.raises(InputError, match="the key '7' is given twice"):
        read_published(path)


def plan_of(ranks: int, path: Path) -> Path:
    shape = ModelShape(layers=128, heads=128, kv_heads=8, head_dim=128)
    plan = make_plan(
        attention=AttentionSpec(
            model=shape, seq_len_tokens=1 << 22, block_size=64, dtype="bfloat16", columns_capacity=4096
        ),
        placement=striped(seq_len_tokens=1 << 22, world_size=ranks, granularity_tokens=64),
        forward=make_layout("ring", {"prefetch": 1}),
        pattern=PatternSpec(source="choose", selector="vertical-slash"),
        kernels=KernelSpec(),
    )
    plan.save(path)
    return path


def test_plans_of_the_most_ranks_are_read_and_of_more_are_not(tmp_path: Path) -> None:
    path = plan_of(4, tmp_path / "plan.json")
    document = json.loads(path.read_text())
    for ranks in (4097, 65536, 10**9):
        document["placement"]["world_size"] = ranks
        path.write_text(json.dumps(document))
        with pytest.raises(InputError, match=r"plan\.json: placement\.world_size: .* 4096"):
            load_plan(path)
    with pytest.raises(InputError, match="4096 nodes of 256 GPUs are 1048576; at most 4096"):
        load_cluster("h100-ndr-4x8", ["nodes=4096", "gpus_per_node=256"])


def test_a_plan_of_4096_ranks_is_read(tmp_path: Path) -> None:
    made = load_plan(plan_of(4, tmp_path / "plan.json"))  # hashing so large a schedule takes minutes
    wide = striped(seq_len_tokens=1 << 22, world_size=4096, granularity_tokens=64)
    placement = made.placement.model_copy(update={"world_size": 4096, "units": tuple(wide.units.reshape(-1).tolist())})
    plan = made.model_copy(update={"placement": placement})
    plan.model_copy(update={"digest": plan.compute_digest()}).save(tmp_path / "plan.json")
    assert load_plan(tmp_path / "plan.json").world_size == 4096


HOSTILE = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202e"


@pytest.mark.parametrize("name", ["plan", "timeline", "cluster", "results", "topology", "published"])
def test_what_files_hold_never_reaches_the_terminal_raw(tmp_path: Path, name: str) -> None:
    """A good file has, somewhere in it, what a terminal would obey."""
    path = FORMATS[name].make(tmp_path)
    good = path.read_text()
    for place in range(0, len(good), max(1, len(good) // 12)):
        path.write_text(good[:place] + HOSTILE + good[place:])
        try:
            FORMATS[name].read(path)
        except InputError as error:
            assert not CONTROL.search(str(error))


def test_what_is_printed_is_written_out(capsys: pytest.CaptureFixture[str]) -> None:
    say(f"of {HOSTILE}")
    show(Table(columns=("name", "rows"), rows=[(HOSTILE, "1")]))
    printed = capsys.readouterr().out
    assert not CONTROL.search(printed) and printed.count("\\x1b]0;owned\\x07") == 2
