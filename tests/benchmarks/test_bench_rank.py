"""benchmarks/rank.py: ranks of a plan for many, two at a time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

import tiny
from sparsering.benchmarks import rank
from sparsering.benchmarks.lib.rank_channels import PairChannels, require_pair
from sparsering.planner.layouts.collective import Collective
from sparsering.planner.layouts.gather import Gather
from sparsering.planner.layouts.hierarchical import Hierarchical
from sparsering.planner.layouts.layout import Layout
from sparsering.planner.layouts.ring import Ring
from sparsering.planner.schedule.pairs import Pairs
from sparsering.planner.schedule.schedule import DIRECTIONS, Schedule
from sparsering.runtime.comm.channels import Channel, Channels, Message, Pending
from sparsering.runtime.comm.mesh import Mesh
from sparsering.traces.errors import InputError, UnsupportedError

TOY = ["--toy", "--density", "0.2", "--repeats", "1"]


def _toy(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "ignore", "-m", "sparsering.benchmarks.rank", *TOY]
    command += ["--results", str(folder), *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=240, env=os.environ | {"PYTHONSAFEPATH": "1"}
    )


def test_two_processes_play_four_ranks_two_at_a_time(tmp_path: Path) -> None:
    layouts = ["gather:chunks=1,pull,keep_kv", "hierarchical:inner_size=2"]
    done = _toy(tmp_path, "--keep-all-pairs", "--ranks", "3", "0", "1", "2", "--layout", *layouts)
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("rank-*.json")
    rows = json.loads(path.read_text())["rows"]
    assert [row["ranks"] for row in rows] == [[3, 0], [1, 2]] * 2
    assert [row["transport"] for row in rows] == ["pull", "pull", "p2p", "p2p"]
    for row in rows:
        assert (row["world_size"], row["seq_len"], row["peak_ratio"]) == (4, 2048, None)
        assert row["predicted_for"] == "local-cpu-4" and 0 < row["predicted_forward_ms"] < row["predicted_backward_ms"]
        assert row["compute_step_ms"] > 0 and row["step_ms"] > 0 and row["predicted_peak_bytes"] > 0


NO_PAIR = (["--ranks", "0", "1"], "ranks: ranks 0 and 1 of gather do not send what the other receives")


@pytest.mark.slow
def test_two_processes_that_cannot_play_say_one_line(tmp_path: Path) -> None:
    done = _toy(tmp_path, *NO_PAIR[0])
    assert done.returncode == 2 and not list(tmp_path.iterdir())
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"rank: {NO_PAIR[1]}")


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--layout", "collective"], "layout: all_gather holds a part for every rank"),
        NO_PAIR,
        (["--ranks", "0", "4"], "--ranks [0, 4]: ranks are 0 to 3"),
        (["--ranks", "0", "1", "2"], "--ranks [0, 1, 2]: not pairs of ranks, each once"),
        (["--ranks", "0", "0"], "--ranks [0, 0]: not pairs of ranks, each once"),
        (["--repeats", "0"], "--repeats 0: at least 1"),
    ],
)
def test_what_two_processes_cannot_play_is_one_line(
    arguments: list[str], problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """As the first of the two says it; it never gets to where it needs the other."""
    alone = Mesh(rank=0, world_size=2, device=torch.device("cpu"), store=None, timeout=None)  # pyright: ignore[reportArgumentType]
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(rank, "join", lambda **_: alone)
    monkeypatch.setattr(sys, "argv", ["rank", *TOY, "--results", str(tmp_path), *arguments])
    with pytest.raises(SystemExit) as ended:
        rank.main()
    line = capsys.readouterr().err.strip() or str(ended.value.code)
    assert ended.value.code not in (None, 0) and len(line.splitlines()) == 1
    assert problem in line and not list(tmp_path.iterdir())


def _schedules(layout: Layout) -> list[Schedule]:
    return [layout.build(shape=tiny.shape(4), direction=direction) for direction in DIRECTIONS]


@pytest.mark.parametrize(
    "layout",
    [Gather(chunks=2), Ring(prefetch=2), Hierarchical(inner_size=2)],
)
def test_any_two_ranks_of_a_regular_layout_are_a_pair(layout: Layout) -> None:
    schedules = _schedules(layout)
    pairs = [(schedule, ranks) for schedule in schedules for ranks in ((0, 1), (3, 1), (2, 3))]
    assert [ranks for schedule, ranks in pairs if not _is_pair(schedule, ranks)] == []


def _is_pair(schedule: Schedule, ranks: tuple[int, int]) -> bool:
    try:
        require_pair(schedule, ranks)
    except InputError:
        return False
    return True


def test_ranks_that_send_different_amounts_are_no_pair() -> None:
    needs = Pairs.all_of(4).matrix.copy()
    needs[0, 3] = False
    schedule = Gather(chunks=1).build(shape=tiny.shape(4), direction="forward", pairs=Pairs.of(needs))
    assert _is_pair(schedule, (1, 2))
    with pytest.raises(InputError, match="ranks 0 and 1 of gather do not send"):
        require_pair(schedule, (0, 1))
    with pytest.raises(UnsupportedError, match="all_gather holds a part for every rank"):
        require_pair(_schedules(Collective())[0], (0, 1))


class _Listening:
    """A channel that keeps what is posted."""

    def __init__(self) -> None:
        self.posted: list[Message] = []

    def post(self, messages: Sequence[Message]) -> Pending:
        self.posted += messages
        return None  # pyright: ignore[reportReturnType]

    def close(self) -> None:
        pass


def test_whatever_rank_is_meant_the_other_process_gets_it(monkeypatch: pytest.MonkeyPatch) -> None:
    listening = _Listening()
    groups: list[tuple[tuple[int, ...], ...]] = []

    def bind(self: Channels, schedules: Sequence[Schedule]) -> dict[str, Channel]:
        groups.extend(one.groups for schedule in schedules for one in schedule.communicators)
        return {one.name: listening for schedule in schedules for one in schedule.communicators}

    monkeypatch.setattr(Channels, "bind", bind)
    mesh = Mesh(rank=1, world_size=2, device=torch.device("cpu"), store=None, timeout=None)  # pyright: ignore[reportArgumentType]
    channels = PairChannels(mesh).bind(_schedules(Hierarchical(inner_size=2)))
    assert set(groups) == {((0, 1),)}
    tensor = torch.zeros(1)
    for channel in channels.values():
        channel.post([Message(operation="send", tensor=tensor, peer=peer) for peer in (0, 2, 3)])
        channel.post([Message(operation="all_reduce", tensor=tensor)])
    assert [message.peer for message in listening.posted] == [0, 0, 0, -1] * len(channels)
