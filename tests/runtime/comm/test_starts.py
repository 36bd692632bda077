"""Ranks that do not start, start as somebody else, or die at their own work: one line on every rank, naming the rank.

Real processes, started by hand as any launcher would, and by `start_ranks`, which serves the store itself.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from forked import Forked
from rank_pool import free_port, processes_of, rank_environment
from sparsering.runtime.comm.place import Place, served_store
from sparsering.runtime.comm.roll_call import require_fitting
from sparsering.traces.errors import InputError

WORKER = Path(__file__).parents[2] / "support" / "ranks" / "start_worker.py"
WORLD_SIZE = 3
SHORT_S = 8.0  # longer than ranks of a busy machine start apart
LIMIT_S = 100.0  # of a test; ranks wait for each other much shorter
LAUNCHER = """
import os, sys
from sparsering.runtime.comm.start import start_ranks
sys.exit(start_ranks(sys.argv[2:], world_size=3, environment=os.environ, module=sys.argv[1]))
"""


@dataclass(frozen=True, kw_only=True)
class Start:
    """How ranks are started, and how the living must end.

    says: words of each rank's one line; codes: exit codes. skipped: ranks that are not started. changed: of a rank's
    environment; None unsets.
    """

    says: Mapping[int, str]
    codes: Mapping[int, int]
    timeout_s: float = 60.0
    victim: int = -1
    how: str = "lives"
    patience_s: float = 0.0
    skipped: tuple[int, ...] = ()
    changed: Mapping[int, Mapping[str, str | None]] = field(default_factory=dict)


def _refused(
    says: str, code: int, *ranks: int, timeout_s: float = 60.0, skipped: tuple[int, ...] = (),
    changed: Mapping[int, Mapping[str, str | None]] | None = None,
) -> Start:  # fmt: skip
    """A start of which these ranks all say the same."""
    return Start(says=dict.fromkeys(ranks, says), codes=dict.fromkeys(ranks, code), timeout_s=timeout_s,
                 skipped=skipped, changed=changed or {})  # fmt: skip


def _dies(victim: int, how: str, says: str, code: int) -> Start:
    others = [rank for rank in range(WORLD_SIZE) if rank != victim]
    return Start(says=dict.fromkeys(others, says), codes=dict.fromkeys(others, 1) | {victim: code}, victim=victim,
                 how=how)  # fmt: skip


ABSENT = f"rank 2 of 3 did not join within {SHORT_S:g} s (seen by rank "
STARTS = {
    "a rank that never starts": _refused(ABSENT, 1, 0, 1, timeout_s=SHORT_S, skipped=(2,)),
    "rank 0 never starts": _refused(
        "rank 0 of 3 never opened the store at 127.0.0.1:", 1, 1, 2, timeout_s=SHORT_S, skipped=(0,)
    ),
    "an address that nobody knows": Start(
        says={0: "MASTER_ADDR: 'nowhere.invalid' is no address: ", 1: "rank 0 of 3 never opened the store at nowhere."},
        codes={0: 2, 1: 1},
        timeout_s=SHORT_S,
        skipped=(2,),
        changed={rank: {"MASTER_ADDR": "nowhere.invalid"} for rank in range(2)},
    ),
    "no address": Start(
        says={0: ABSENT, 1: ABSENT, 2: "MASTER_ADDR: is not set: start ranks with torchrun"},
        codes={0: 1, 1: 1, 2: 2},
        timeout_s=SHORT_S,
        changed={2: {"MASTER_ADDR": None}},
    ),
    "a rank beyond the last": Start(
        says={0: ABSENT, 1: ABSENT, 2: "RANK: 7 is not a rank of 3 (WORLD_SIZE): 0 to 2"},
        codes={0: 1, 1: 1, 2: 2},
        timeout_s=SHORT_S,
        changed={2: {"RANK": "7"}},
    ),
    "another number of ranks": _refused(
        "WORLD_SIZE: rank 1 was started with 4, rank 0 with 3", 2, 0, 1, 2, changed={1: {"WORLD_SIZE": "4"}}
    ),
    "a rank that raises": _dies(1, "raises", "rank 1 of 3 ended; it said: OSError: no data left", 1),
    "rank 0 raises": _dies(0, "raises", "rank 0 of 3 ended; it said: OSError: no data left", 1),
    "a rank that raises while others wait for its word": _dies(1, "says", "rank 1 of 3 ended; it said: OSError: no", 1),
    "a rank that raises while others make a group": _dies(
        1, "groups", "rank 1 of 3 ended; it said: OSError: no data left", 1
    ),
    "a rank that comes late": Start(
        says=dict.fromkeys(range(3), "rank 1 of 3 did not come in time (seen by rank "),
        codes=dict.fromkeys(range(3), 1),
        timeout_s=SHORT_S,
        victim=1,
        how="late",
    ),
    "a rank that exits": _dies(1, "exits", "rank 1 of 3 stopped answering (seen by rank ", 3),
    "a rank that is killed": _dies(2, "killed", "rank 2 of 3 stopped answering (seen by rank ", -signal.SIGKILL),
    "the store's host is killed": _dies(0, "killed", "rank 0 of 3, which hosts the store, stopped ", -signal.SIGKILL),
    "a rank that is killed while all leave": _dies(
        1, "killed leaving", "rank 1 of 3 stopped answering (seen by rank 0); all others", -signal.SIGKILL
    ),
    "a rank that is killed while all leave, and are watched": Start(
        says=dict.fromkeys((0, 2), "rank 1 of 3 stopped answering (seen by rank "),
        codes={0: 1, 1: -signal.SIGKILL, 2: 1}, victim=1, how="killed leaving", patience_s=6.0,
    ),
    "the store's host is killed while all leave": _dies(
        0, "killed leaving", "rank 0 of 3, which hosts the store, stopped ", -signal.SIGKILL
    ),
    "a rank that raises while others leave": _dies(
        2, "raises leaving", "rank 2 of 3 ended; it said: OSError: no data left", 1
    ),
    "a rank that is killed after all others left": Start(
        says={0: "rank 2 of 3 stopped answering (seen by rank 0)"}, codes={0: 1, 1: 0, 2: -signal.SIGKILL}, victim=2,
        how="killed closing",
    ),
    "a rank that leaves beyond the time-out": Start(
        says=dict.fromkeys(range(3), "rank 1 of 3 did not come in time (seen by rank "),
        codes=dict.fromkeys(range(3), 1), timeout_s=SHORT_S, victim=1, how="slow",
    ),
    "a rank that leaves late": Start(says={}, codes=dict.fromkeys(range(3), 0), victim=1, how="slow"),
    "the store's host leaves late": Start(says={}, codes=dict.fromkeys(range(3), 0), victim=0, how="slow"),
    "a rank that exits and does not leave": Start(says={}, codes=dict.fromkeys(range(3), 0), victim=2, how="unleft"),
    "the store's host exits and does not leave": Start(
        says={}, codes=dict.fromkeys(range(3), 0), victim=0, how="unleft"
    ),
    "all leave": Start(says={}, codes=dict.fromkeys(range(3), 0)),
}  # fmt: skip


def _started(start: Start, port: int, folder: Path) -> dict[int, tuple[int, str]]:
    """Return exit code and stderr of every rank."""
    processes: dict[int, Forked | subprocess.Popen[bytes]] = {}
    for rank in range(WORLD_SIZE):
        if rank not in start.skipped:
            environment = rank_environment(rank, WORLD_SIZE, port, LOCAL_RANK="0", TORCH_CPP_LOG_LEVEL="ERROR")
            changed = environment | dict(start.changed.get(rank, {}))
            processes[rank] = _rank(
                [str(start.timeout_s), str(start.victim), start.how, str(start.patience_s)],
                {name: value for name, value in changed.items() if value is not None}, folder / f"told {rank}",
            )  # fmt: skip
    try:
        deadline = time.monotonic() + LIMIT_S
        codes = {rank: process.wait(max(0.1, deadline - time.monotonic())) for rank, process in processes.items()}
        return {rank: (code, (folder / f"told {rank}").read_text()) for rank, code in codes.items()}
    finally:
        for process in processes.values():
            process.kill()


def _rank(arguments: list[str], environment: dict[str, str], told: Path) -> Forked | subprocess.Popen[bytes]:
    """Start a rank: a process of its own where it is to find other packages, else forked, which spares importing."""
    with told.open("wb") as file, open(os.devnull, "r+b") as nothing:
        if environment.get("PYTHONPATH") == os.environ.get("PYTHONPATH"):
            return Forked(WORKER, arguments, environment, (nothing.fileno(), nothing.fileno(), file.fileno()))
        return subprocess.Popen(
            [sys.executable, str(WORKER), *arguments], env=environment, stdin=nothing, stdout=nothing, stderr=file
        )  # fmt: skip


def _judge(start: Start, port: int, folder: Path) -> None:
    ended = _started(start, port, folder)
    assert {rank: code for rank, (code, _) in ended.items()} == start.codes, ended
    assert all(told == "" for code, told in ended.values() if code == 0), ended
    for rank, says in start.says.items():
        lines = ended[rank][1].splitlines()
        assert len(lines) == 1 and lines[0].startswith(f"sparsering: {says}"), ended[rank][1]


@pytest.mark.slow
@pytest.mark.parametrize("name", STARTS)
def test_every_rank_says_one_line(name: str, tmp_path: Path) -> None:
    _judge(STARTS[name], free_port(), tmp_path)


@pytest.mark.slow
def test_a_port_that_is_taken(tmp_path: Path) -> None:
    """The others find somebody there who does not speak, which torch would wait for without end."""
    with socket.socket() as taker:
        taker.bind(("127.0.0.1", 0))
        taker.listen(8)
        port = taker.getsockname()[1]
        taken = f"MASTER_PORT: {port}: nothing can listen there at 127.0.0.1: address already in use"
        mute = f"MASTER_PORT: {port}: what listens at 127.0.0.1 is not the ranks' store: it does not answer"
        start = Start(says={0: taken, 1: mute}, codes={0: 2, 1: 2}, timeout_s=SHORT_S, skipped=(2,))
        _judge(start, port, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("package", ["sparsering", "torch", "numpy"])
def test_another_version_on_one_rank(package: str, tmp_path: Path) -> None:
    folder = tmp_path / f"{package}-9.8.7.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 9.8.7\n")
    says = f"{package}: rank 1 has 9.8.7, rank 0 has "
    _judge(_refused(says, 2, 0, 1, 2, changed={1: {"PYTHONPATH": str(tmp_path)}}), free_port(), tmp_path)


@pytest.mark.parametrize(
    ("package", "versions", "fit"),
    [
        ("torch", ("2.13.0+cpu", "2.13.0+cu130"), False),
        ("torch", ("2.13.0", "2.13.0"), True),
        ("numpy", ("2.4.6", "2.4.1"), True),
        ("numpy", ("2.4.6", "2.5.6"), False),
        ("triton", ("3.6.0", None), False),
        ("triton", (None, None), True),
        ("Python", ("3.11.7", "3.11.9"), True),
        ("Python", ("3.11.7", "3.12.7"), False),
        ("transformers", ("5.24.0", "5.24.1"), False),
    ],
)
def test_how_closely_versions_agree(package: str, versions: tuple[str | None, str | None], fit: bool) -> None:
    told = [{"world_size": 2, "versions": {package: version}} for version in versions]
    if fit:
        require_fitting(told)
        return
    with pytest.raises(InputError, match=f"^{package}: ") as raised:
        require_fitting(told)
    assert f"rank 1 has {versions[1] or 'none'}, rank 0 has {versions[0]}: install the same" in str(raised.value)


@pytest.mark.parametrize("rank", ["--1", "9" * 5000, "one", "-1", "²", "3"])
def test_a_rank_that_is_no_number_is_refused(rank: str) -> None:
    told = {"RANK": rank, "WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    with pytest.raises(InputError, match="RANK") as caught:
        Place.parsed(told, launcher_hosts=False)
    assert len(str(caught.value)) < 200 and "\n" not in str(caught.value)


def test_a_store_is_served_at_its_address_alone() -> None:
    store = served_store(timeout_s=5.0)
    assert _listening(store.port) == ["0100007F"]
    with pytest.raises(InputError, match=rf"^MASTER_PORT: {store.port}: nothing can listen there at 127.0.0.1"):
        served_store("127.0.0.1", store.port, timeout_s=5.0)


def test_a_name_of_another_host_is_served_on_all_addresses() -> None:
    """192.0.2.1 is nobody's: it stands for an address that only translation leads to this host."""
    store = served_store("192.0.2.1", free_port(), timeout_s=5.0)
    assert _listening(store.port) == ["00000000"]


def _listening(port: int) -> list[str]:
    """Return the addresses, in the kernel's hexadecimal, at which somebody listens on a port."""
    rows = [row.split() for table in ("tcp", "tcp6") for row in Path(f"/proc/net/{table}").read_text().splitlines()[1:]]
    places = [row[1].split(":") for row in rows if row[3] == "0A"]
    return [address for address, number in places if int(number, 16) == port]


def _launched(folder: Path, module: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, module, *arguments], cwd=folder, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": str(WORKER.parent), "SPARSERING_TEST_RUN": str(folder), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


@pytest.mark.slow
def test_the_launcher_tells_the_others_who_was_killed(tmp_path: Path) -> None:
    """rank 0, of whom nobody would hear if it held the store itself."""
    with _launched(tmp_path, "start_worker", "60", "0", "killed") as launcher:
        _, told = launcher.communicate(timeout=LIMIT_S)
    line = "sparsering: rank 0 of 3 stopped answering (seen by the launcher); ended by SIGKILL"
    assert (launcher.returncode, told.splitlines()) == (128 + signal.SIGKILL, [line] * 3)
    assert processes_of(tmp_path) == []


@pytest.mark.slow
def test_the_launcher_names_a_rank_that_nobody_else_can(tmp_path: Path) -> None:
    """The others had ended, with 0, when it failed."""
    with _launched(tmp_path, "start_worker", "60", "1", "ends") as launcher:
        _, told = launcher.communicate(timeout=LIMIT_S)
    line = "sparsering: rank 1 of 3 stopped answering (seen by the launcher); ended with exit code 3"
    assert (launcher.returncode, told.splitlines()) == (3, [line])


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGHUP])
def test_nothing_is_left_of_a_launcher_that_ends(number: signal.Signals, tmp_path: Path) -> None:
    with _launched(tmp_path, "timeit", "-n", "1", "-r", "1", "import time; time.sleep(600)") as launcher:
        _wait_for(lambda: sum(_is_tied(process) for process in processes_of(tmp_path)) == WORLD_SIZE)
        launcher.send_signal(number)
        code = launcher.wait(LIMIT_S)
        assert code == (-number if number == signal.SIGKILL else 128 + number)
        _wait_for(lambda: processes_of(tmp_path) == [])


def _is_tied(process: int) -> bool:
    """Whether a process has got as far as the module that it runs."""
    return "sparsering.runtime.comm.tied" in Path(f"/proc/{process}/cmdline").read_text()


def _wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)
