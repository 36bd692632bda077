"""The sentinel, with real processes: who is gone is named by all others, who ends in order or pauses is not.

The rank that is killed while others wait on a GPU is in test_gpu_failures.py.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

import pytest

from forked import Forked
from rank_pool import free_port, rank_environment
from sparsering.runtime.comm.mesh import join, usual_patience_s
from sparsering.runtime.comm.sentinel import Silence, Watch
from sparsering.traces.errors import InputError

WORKER = Path(__file__).parents[2] / "support" / "ranks" / "sentinel_worker.py"
WORLD_SIZE = 3
PATIENCE_S = 2.0
TIMEOUT_S = 60.0

# A rank that joins as the commands do, and works without talking to anybody until it is told that somebody is lost.
JOINING = """
import sys, time
from sparsering.runtime.comm.mesh import RankLost, join, leave, naming_lost_ranks
mesh = join(device="cpu", timeout_s=60, patience_s=float(sys.argv[1]))
print("ready", flush=True)
try:
    with naming_lost_ranks(mesh):
        while True:
            time.sleep(0.05)
            mesh.check()
except RankLost as error:
    print(f"main thread: {error}", file=sys.stderr)
    raise SystemExit(3)
finally:
    leave()
"""


class Ranks:
    """Started processes that have said "ready". folder: where their stderr goes."""

    def __init__(self, commands: list[list[str]], folder: Path) -> None:
        port = free_port()
        self.errors = [folder / f"errors {rank}" for rank in range(len(commands))]
        self.processes: list[Forked] = []
        self.lines: list[tuple[TextIO, TextIO]] = []  # what each reads and writes
        for rank, (script, *arguments) in enumerate(commands):
            given = [part.replace("PORT", str(port)) for part in arguments]
            self._start(Path(script), given, rank, rank_environment(rank, len(commands), port))
        for rank in range(len(commands)):
            assert self.hear(rank) == "ready", self.ends(rank)

    def _start(self, script: Path, arguments: list[str], rank: int, environment: dict[str, str]) -> None:
        (read, tells), (hears, written) = os.pipe(), os.pipe()
        with self.errors[rank].open("w") as errors:
            self.processes.append(Forked(script, arguments, environment, (read, written, errors.fileno())))
        self.lines.append((os.fdopen(tells, "w"), os.fdopen(hears)))
        os.close(read)
        os.close(written)

    def tell(self, rank: int, word: str) -> None:
        """Have a rank's main thread do something."""
        self.lines[rank][0].write(f"{word}\n")
        self.lines[rank][0].flush()

    def hear(self, rank: int) -> str:
        """Return the next line that a rank prints."""
        return self.lines[rank][1].readline().strip()

    def ends(self, rank: int) -> tuple[int, str]:
        """Return a rank's exit code and what it said on stderr."""
        code = self.processes[rank].wait(TIMEOUT_S)
        return code, self.errors[rank].read_text()

    def kill(self, rank: int) -> None:
        """End a rank as the kernel would."""
        self.processes[rank].kill()


@pytest.fixture
def started(tmp_path: Path) -> Iterator[Callable[[list[list[str]]], Ranks]]:
    """Start ranks; nothing of them is left after the test."""
    all_ranks: list[Ranks] = []

    def start(commands: list[list[str]]) -> Ranks:
        all_ranks.append(Ranks(commands, tmp_path))
        return all_ranks[-1]

    yield start
    for ranks in all_ranks:
        for process, lines in zip(ranks.processes, ranks.lines, strict=True):
            process.kill()
            process.wait(TIMEOUT_S)
            for line in lines:
                line.close()


def _watching(world_size: int = WORLD_SIZE) -> list[list[str]]:
    return [[str(WORKER), str(rank), str(world_size), "PORT", str(PATIENCE_S)] for rank in range(world_size)]


def test_a_killed_rank_is_named_by_all_others_whose_main_thread_waits(started: Callable[..., Ranks]) -> None:
    ranks = started(_watching())
    ranks.tell(0, "wait")  # in C++, over the connection that this rank shares with nobody's heartbeat
    ranks.kill(1)  # rank 2 waits for its standard input
    for rank in (0, 2):
        code, errors = ranks.ends(rank)
        assert code == 1
        assert f"sparsering: rank 1 of {WORLD_SIZE} stopped answering (seen by rank " in errors


def test_ranks_that_are_gone_at_once_are_named_together(started: Callable[..., Ranks]) -> None:
    ranks = started(_watching())
    ranks.kill(1)
    ranks.tell(2, "go")  # ends well, but says no goodbye
    code, errors = ranks.ends(0)
    assert code == 1
    assert f"sparsering: rank 1, rank 2 of {WORLD_SIZE} stopped answering (seen by rank 0)" in errors
    assert ranks.ends(2) == (0, "")


def test_the_host_of_the_store_dies(started: Callable[..., Ranks]) -> None:
    ranks = started(_watching())
    ranks.kill(0)
    for rank in (1, 2):
        code, errors = ranks.ends(rank)
        assert code == 1
        expected = f"rank 0 of {WORLD_SIZE}, which hosts the store, stopped answering (seen by rank {rank})"
        assert f"sparsering: {expected}" in errors


def test_the_host_of_the_store_hangs(started: Callable[..., Ranks]) -> None:
    """Nothing fails then: the connection stands, and nobody answers."""
    ranks = started(_watching(2))
    os.kill(ranks.processes[0].pid, signal.SIGSTOP)
    code, errors = ranks.ends(1)
    assert code == 1
    assert "rank 0 of 2, which hosts the store, stopped answering (seen by rank 1); no answer for 2 s" in errors


def test_ranks_that_leave_in_order_are_not_missed(started: Callable[..., Ranks]) -> None:
    """One leaves long before, then the host of the store, whose end is no loss to the last."""
    ranks = started(_watching())
    ranks.tell(1, "leave")
    assert ranks.ends(1) == (0, "")
    ranks.tell(2, "verdict")
    ranks.tell(0, "leave")  # it stays a while for the last, then goes
    assert ranks.ends(0) == (0, "")
    assert ranks.hear(2) == "None"
    ranks.tell(2, "leave")
    assert ranks.ends(2)[0] == 0


def test_a_pause_shorter_than_the_patience_is_no_loss(started: Callable[..., Ranks]) -> None:
    ranks = started(_watching(2))
    for paused in (1, 0):
        os.kill(ranks.processes[paused].pid, signal.SIGSTOP)
        time.sleep(PATIENCE_S / 2)  # the pause itself
        os.kill(ranks.processes[paused].pid, signal.SIGCONT)
    for rank in (0, 1):
        ranks.tell(rank, "verdict")
    assert [ranks.hear(rank) for rank in (0, 1)] == ["None", "None"]
    for rank in (0, 1):
        ranks.tell(rank, "leave")
    assert [ranks.ends(rank)[0] for rank in (0, 1)] == [0, 0]


def test_the_main_thread_raises_at_its_next_check(started: Callable[..., Ranks], tmp_path: Path) -> None:
    script = tmp_path / "joining.py"
    script.write_text(JOINING)
    ranks = started([[str(script), str(PATIENCE_S)] for _ in range(2)])
    ranks.kill(1)
    code, errors = ranks.ends(0)
    assert code == 3
    assert "main thread: rank 1 of 2 stopped answering (seen by rank 0); no heartbeat for 2 s" in errors


def test_silence_is_counted_by_what_was_heard() -> None:
    silence = Silence(world_size=4)
    for beat in range(3):
        silence.hear([str(beat), "7", None, "left"], 1.0)
    assert silence.silent_s == [0.0, 2.0, 0.0, 0.0]
    assert silence.beyond(1.5) == [1]
    silence.hear(["2", "8", None, "left"], 1.0)
    assert silence.silent_s == [1.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize("patience_s", [-1.0, 60.0])
def test_patience_is_less_than_the_time_out(patience_s: float) -> None:
    with pytest.raises(InputError, match="patience_s"):
        join(device="cpu", timeout_s=60.0, patience_s=patience_s)


def test_patience_is_settled_by_the_device() -> None:
    """On GPUs nobody else says who died; `run` and `train` leave it to this unless told otherwise."""
    assert (usual_patience_s("cuda", 600.0), usual_patience_s("cpu", 600.0)) == (300.0, 0.0)
    settled: list[float] = []

    def stop(patience_s: float, timeout_s: float) -> None:
        settled.append(patience_s)
        raise InputError("far enough")

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("sparsering.runtime.comm.mesh.check_patience", stop)
        for device, patience_s in (("cuda", None), ("cpu", None), ("cuda", 0.0), ("cpu", 7.0)):
            with pytest.raises(InputError, match="far enough"):
                join(device=device, timeout_s=60.0, patience_s=patience_s)
    assert settled == [30.0, 0.0, 0.0, 7.0]


def test_a_watch_without_patience_is_refused() -> None:
    with pytest.raises(InputError, match="patience_s"):
        Watch(rank=0, world_size=2, store_host="rank 0", patience_s=0.0)
