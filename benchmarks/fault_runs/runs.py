"""One run with its fault: what is prepared for it, how it is started, what is seen of it."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...traces.yaml_files import yaml_text
from . import cases
from .cases import KINDS, PLACES, STEPS, Case
from .judged import EXIT_CODE, PLANTED, VERSION, Seen, limit_s
from .plant import FAULT, LAUNCHER, Planted
from .watched import MARK, Watched, listens

SITE = Path(__file__).parent / "site"
TRAIN = ["train", "config.yaml"]
SEQ_LEN_TOKENS = {"cpu": 256, "cuda": 1024}
STARTING_S = 900.0  # in which a busy machine starts the ranks
WITHIN_S = 6.0  # how late a rank is that is not too late
# How much later than the time-out one comes that is: after the others have found out, which takes NCCL longer.
BEYOND_S = {"cpu": 12.0, "cuda": 60.0}
FULL_BYTES, SMALL_BYTES, TMPFS_BYTES, ROOMY_BYTES = 8192, 16, 100_000, 64_000_000
PARTIAL = "*.partial*"
_COMPLETE = re.compile(r"step-(\d{8})")


@dataclass(frozen=True, kw_only=True)
class Workplace:
    """What all runs share: a folder with model, data and plans, and the environment that they start in."""

    folder: Path
    environment: dict[str, str]


class Run:
    """Prepares, starts and watches one case."""

    def __init__(self, case: Case, place: Workplace) -> None:
        self.case, self._place = case, place
        self.folder = place.folder / "runs" / f"{case.number:03d}"
        self._sign = self.folder / "fault"
        self._port: int | None = None

    def seen(self) -> Seen:
        """Run it, and the next start of the same run where that has to go on; return what was seen."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        self._write_config("config.yaml")
        with ExitStack() as stack:
            stack.enter_context(self._surroundings())
            found = self._watched(self._planted(), port=self._port)
            if self._goes_on():
                self._start_again(found)
        return found

    def _watched(self, planted: list[Planted], *, port: int | None) -> Seen:
        case, began = self.case, time.time()
        mark = uuid.uuid4().hex
        watched = Watched(mark, self.folder)
        try:
            port = self._start(watched, self._environment(mark, planted), port)
            ended = watched.wait(began + STARTING_S, self._sign.exists)
            if not ended and self._sign.exists():
                self._strike(watched)
            fired = json.loads(self._sign.read_text())["time"] if self._sign.exists() else None
            watched.wait((fired or time.time()) + limit_s(case) + 30.0)
            codes, ended_at = watched.codes(), watched.ended_at()
        finally:
            left = watched.end()
        checkpoints = self.folder / "checkpoints"
        return Seen(
            codes=codes, said=watched.said(), seconds=round(ended_at - (fired or began), 3),
            fired=fired is not None or case.place == "start",
            port=port, left=left if None not in codes.values() else [],
            listening=int(port is not None and case.kind != "a port that is taken" and listens(port)),
            partial=sorted(path.name for path in self.folder.rglob(PARTIAL)), complete=_complete(checkpoints),
        )  # fmt: skip

    def _goes_on(self) -> bool:
        """Whether the next start is looked at: where checkpoints may have been written before the fault."""
        return (
            self.case.steps > 0 and self.case.launcher != "run" and not KINDS[self.case.kind].unharmed
            and (self.case.device == "cpu" or self.case.kind == "SIGKILL of a rank")
        )  # fmt: skip

    def _start_again(self, found: Seen) -> None:
        """Start the same command again, without a fault: it goes on from the last complete checkpoint to the end."""
        for path in (self.folder / "metrics").glob("*"):
            if path.is_symlink():
                path.unlink()
        if os.path.ismount(self.folder / "checkpoints"):
            _mounts(self.folder / "checkpoints", size_bytes=ROOMY_BYTES, options="remount,")
        wanted = found.complete[-1] if found.complete else 0
        watched = Watched(uuid.uuid4().hex, self.folder)
        try:
            if self.case.device == "cpu":
                watched.fork("again", TRAIN, self._environment("", []), launches=True)
            else:
                watched.start("again", [sys.executable, "-m", "sparsering", *TRAIN], self._environment("", []))
            ended = watched.wait(time.time() + STARTING_S)
        finally:
            left = watched.end()
        said = watched.said()
        told = re.search(r"resumed at step (\d+)", said)
        went_on = int(told.group(1)) if told else 0
        found.next_start = f"went on at step {went_on}" if went_on else "began anew"
        checkpoints = self.folder / "checkpoints"
        done = ended and watched.codes()["again"] == 0 and _complete(checkpoints)[-1:] == [STEPS]
        remains = [*left, *(path.name for path in checkpoints.rglob(PARTIAL))]
        if not done or remains:
            found.next_start = f"left {', '.join(remains)}" if done else f"failed: {said[-300:]}"
        found.next_start_right = done and went_on == wanted and not remains

    # What is prepared ------------------------------------------------------------------------------------------------

    def _write_config(self, name: str, **changes: Any) -> Path:
        case, shared = self.case, self._place.folder
        config: dict[str, Any] = {
            "model": {"path": str(shared / "model"), "random_weights": True}, "data": {"folder": str(shared / "data")},
            "seq_len_tokens": SEQ_LEN_TOKENS[case.device], "steps": STEPS,
            "dtype": "bfloat16" if case.device == "cuda" else "float32", "device": case.device,
            "parallel": {"data": 1, "context": case.ranks},
            "plan": {"block_size": 64, "layout": case.attention, "pattern": {"selector": "sink-window"}},
            "optimizer": {"learning_rate": 1e-3, "warmup_steps": 2}, "timeout_s": case.timeout_s,
            "patience_s": case.patience_s, "verify": {"every_steps": 1}, "metrics": {"folder": "metrics"},
            "checkpoint": {"folder": "checkpoints", "every_steps": 1, "asynchronous": case.asynchronous},
        }  # fmt: skip
        path = self.folder / name
        path.write_text(yaml_text(config | changes))
        return path

    @contextmanager
    def _surroundings(self) -> Iterator[None]:
        """Prepare what the fault is made of outside the processes."""
        case = self.case
        with ExitStack() as stack:
            if case.kind == "a port that is taken":
                taker = stack.enter_context(socket.socket())
                taker.bind(("127.0.0.1", 0))
                taker.listen(8)
                self._port = taker.getsockname()[1]
            if case.kind == "a full disk of a rank" and case.place == "metrics":
                (self.folder / "metrics").mkdir()
                (self.folder / "metrics" / f"rank-{case.rank:05d}.jsonl").symlink_to("/dev/full")
            if case.kind == "another version on a rank":
                folder = self.folder / "packages" / f"{case.detail}-{VERSION}.dist-info"
                folder.mkdir(parents=True)
                (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {case.detail}\nVersion: {VERSION}\n")
            if case.kind == "a full disk of all ranks":
                (self.folder / "checkpoints").mkdir()
                if _mounts(self.folder / "checkpoints", size_bytes=TMPFS_BYTES):
                    stack.callback(_unmount, self.folder / "checkpoints")
            if case.kind in ("another configuration on a rank", "an unreadable configuration on a rank"):
                self._write_other()
            yield

    def _write_other(self) -> None:
        parallel = {"data": 1, "context": self.case.ranks + 1}
        match self.case.detail:
            case "another seed":
                self._write_config("other.yaml", seed=1)
            case "another number of ranks":
                self._write_config("other.yaml", parallel=parallel)
            case "not YAML":
                (self.folder / "other.yaml").write_text("steps: [\n")

    # What is planted --------------------------------------------------------------------------------------------------

    def _planted(self) -> list[Planted]:
        case = self.case
        place = (cases.RUNNING if case.launcher == "run" else PLACES).get(case.place, "")
        calls = 2 if case.launcher == "run" and case.place in ("forward", "backward") else 0
        here: dict[str, Any] = {
            "rank": case.rank, "target": place, "steps": case.steps, "calls": calls, "sign": str(self._sign),
        }  # fmt: skip
        at_the_start: dict[str, Any] = {
            "rank": (case.rank + 1) % case.ranks, "target": PLACES["before joining"], "action": "note",
            "sign": str(self._sign),
        }  # fmt: skip

        def struck(**changes: Any) -> Planted:
            return Planted(**(here | changes))

        match case.kind:
            case "SIGKILL of a rank" | "SIGTERM or SIGHUP of a rank" | "SIGSTOP of a rank":
                name = case.detail or case.kind.partition(" ")[0]
                return [struck(action="signal", value=name)]
            case "exception in a rank":
                return [struck(action="raise", value=(case.detail, PLANTED))]
            case "a rank exits without a word":
                return [struck(action="exit", value=EXIT_CODE)]
            case "a rank beyond the time-out":
                return [struck(action="sleep", value=case.timeout_s + BEYOND_S[case.device])]
            case "a slow rank within the time-out":
                return [struck(action="sleep", value=WITHIN_S)]
            case "a signal to the launcher" | "Ctrl-C of ranks started by hand":
                return [struck(action="hold")]
            case "exception in the launcher":
                target = "sparsering.runtime.comm.start:_Ranks._failure"
                launcher = Planted(rank=LAUNCHER, target=target, action="raise", value=(case.detail, PLANTED),
                                   awaited=str(self._sign))  # fmt: skip
                return [struck(action="hold"), launcher]
            case "another version on a rank":
                folder = str(self.folder / "packages")
                return [Planted(rank=case.rank, target="", action="versions", value=folder), Planted(**at_the_start)]
            case "another configuration on a rank" | "an unreadable configuration on a rank":
                other = Planted(rank=case.rank, target="sparsering.runtime.train.config:load_config",
                                action="other file", value="other.yaml")  # fmt: skip
                return [other, Planted(**at_the_start)]
            case "a full disk of a rank" if case.place == "metrics":
                return [struck(steps=0, action="note")]
            case "a full disk of a rank":
                few = SMALL_BYTES if case.place == "checkpoint, sealing" else FULL_BYTES
                return [struck(action="limit", value=few)]
            case "a full disk of all ranks":
                if os.path.ismount(self.folder / "checkpoints"):
                    return [struck(steps=0, action="note")]
                return [struck(rank=rank, steps=0, action="limit", value=FULL_BYTES)
                        for rank in range(case.ranks)]  # fmt: skip
        return [Planted(**at_the_start)]

    def _environment(self, mark: str, planted: list[Planted]) -> dict[str, str]:
        paths = [str(SITE), *filter(None, [self._place.environment.get("PYTHONPATH")])]
        own = {MARK: mark, FAULT: json.dumps([asdict(one) for one in planted]), "PYTHONPATH": os.pathsep.join(paths)}
        return self._place.environment | own

    # How it is started ------------------------------------------------------------------------------------------------

    def _start(self, watched: Watched, environment: dict[str, str], port: int | None) -> int | None:
        """Start what the case starts; return the port that ranks were told to meet at, if they were."""
        case = self.case
        if case.launcher == "torchrun":
            where = ["--standalone"] if port is None else ["--master-addr", "127.0.0.1", "--master-port", str(port)]
            command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(case.ranks), *where, "-m",
                       "sparsering.runtime.train", "config.yaml"]  # fmt: skip
            watched.start("torchrun", command, environment)
            return port
        if case.launcher in ("train", "run"):
            self._begin(watched, "launcher", self._verb(), environment, launches=True)
            return None
        port = port or _free_port()
        for rank in range(case.ranks):
            if not (case.kind == "a rank that never starts" and rank == case.rank):
                self._start_rank(watched, rank, environment, port)
        if case.kind == "two processes as one rank":
            self._start_rank(watched, case.rank, environment, port, name=f"rank {case.rank}, again")
        return port

    def _verb(self) -> list[str]:
        if self.case.launcher == "train":
            return TRAIN
        plan = str(self._place.folder / f"plan-{self.case.attention}-{self.case.ranks}.json")
        return ["run", plan, "--device", self.case.device, "--timeout-s", f"{self.case.timeout_s:g}"]

    def _start_rank(
        self, watched: Watched, rank: int, environment: dict[str, str], port: int, name: str = ""
    ) -> None:  # fmt: skip
        own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": self.case.ranks, "MASTER_PORT": port}
        told = environment | {name: str(value) for name, value in own.items()} | {"MASTER_ADDR": "127.0.0.1"}
        self._begin(watched, name or f"rank {rank}", TRAIN, told, launches=False)

    def _begin(
        self, watched: Watched, name: str, arguments: list[str], environment: dict[str, str], *, launches: bool
    ) -> None:  # fmt: skip
        if self.case.started == "fork":
            watched.fork(name, arguments, environment, launches=launches)
        else:
            watched.start(name, [sys.executable, "-m", "sparsering", *arguments], environment)

    def _strike(self, watched: Watched) -> None:
        """Do from outside what the case wants done once the rank is at its place."""
        if self.case.kind in ("a signal to the launcher", "Ctrl-C of ranks started by hand"):
            number = signal.Signals[self.case.detail]
            watched.send(number, group=number == signal.SIGINT)


def _complete(folder: Path) -> list[int]:
    """Return the steps of complete checkpoints, as a user would see them."""
    found = [_COMPLETE.fullmatch(path.name) for path in folder.glob("*") if (path / "manifest.json").is_file()]
    return sorted(int(one.group(1)) for one in found if one)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _mounts(folder: Path, *, size_bytes: int, options: str = "") -> bool:
    """Whether a small file system of its own could be mounted at a folder, or its size changed by the options."""
    command = ["mount", "-t", "tmpfs", "-o", f"{options}size={size_bytes}", "none", str(folder)]
    with suppress(OSError):
        return subprocess.run(command, stderr=subprocess.DEVNULL, check=False).returncode == 0
    return False


def _unmount(folder: Path) -> None:
    subprocess.run(["umount", "--lazy", str(folder)], check=False)
