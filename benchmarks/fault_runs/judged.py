"""What a run with a fault must look like from outside, and whether it does."""

from __future__ import annotations

import re
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from .cases import KINDS, STARTING, STEPS, Case, told_by_timeout

PLANTED = "planted from outside"
EXIT_CODE = 7  # of a rank that exits without a word
VERSION = "9.8.7"
# What comes after the time-out where nothing but that tells: ranks ask who lives, the launcher gives them a grace, and
# torchrun one of its own.
ARRIVING_S = 60.0  # in which the others come to where they wait: importing torch takes long on a busy machine
ASKING_S, GRACE_S, TORCHRUN_S, SLACK_S = 5.0, 15.0, 30.0, 30.0
BLAMED = re.compile(
    r"^sparsering: (rank \d+(?:, rank \d+)*) of \d+(?:, which hosts the store,)? (?:stopped|ended|did not|never)",
    re.MULTILINE,
)


@dataclass(kw_only=True)
class Seen:
    """What was seen of a run.

    codes: exit codes, of the launcher or of each rank; None of a process that had to be killed. said: stdout and stderr
    of all, mixed as they came. seconds: from the fault until the last process had ended. fired: whether the fault came.
    left: processes, listening: sockets that still were there a moment later. next_start: what the next start of the
    same run said, and whether that was right; None where there was none.
    """

    codes: Mapping[str, int | None]
    said: str
    seconds: float
    fired: bool
    port: int | None = None
    left: Sequence[str] = ()
    listening: int = 0
    partial: Sequence[str] = ()
    complete: Sequence[int] = ()
    next_start: str | None = None
    next_start_right: bool = True
    files: Sequence[str] = field(default_factory=list)


def limit_s(case: Case) -> float:
    """Return within what time of the fault all processes must have ended."""
    kind = KINDS[case.kind]
    if kind.unharmed:
        return 2 * case.timeout_s  # what is left of the run itself
    after = ASKING_S + GRACE_S + SLACK_S if told_by_timeout(case.kind, case.launcher, case.place) else 0.0
    after += ARRIVING_S if case.place in STARTING else 0.0
    return case.timeout_s + after + (TORCHRUN_S if case.launcher == "torchrun" else 0.0)


def could_know(case: Case) -> bool:
    """Whether a rank, or the launcher, could know which rank it was, and why: not of what was done to the launcher."""
    told_nothing = ("a signal to the launcher", "Ctrl-C of ranks started by hand", "a port that is taken",
                    "exception in the launcher")  # fmt: skip
    return not KINDS[case.kind].unharmed and case.kind not in told_nothing


def expected(case: Case, seen: Seen) -> str:
    """Return the pattern of a line that names the rank and the cause; of the cause alone where no rank is at fault."""
    rank, world = case.rank, case.ranks
    who = rf"rank {rank} of {world}"
    launched = case.launcher in ("train", "run")
    absent = rf"(rank 0 of {world} never opened the store|{who} did not join within)"
    gone = rf"{who}(, which hosts the store,)? stopped answering"
    other = rank or 1  # ranks are compared with rank 0: where that one differs, the next is named beside it
    by_torchrun = rf"rank +: {rank} \(local_rank: {rank}\)\n +exitcode +: "
    match case.kind:
        case "SIGKILL of a rank" | "SIGTERM or SIGHUP of a rank":
            name = case.detail or "SIGKILL"
            if launched:
                return rf"{gone} \(seen by the launcher\); ended by {name}"
            if case.launcher == "torchrun":
                return rf"{by_torchrun}-{int(signal.Signals[name])} "
            return rf"{gone}|{absent}" if case.place in ("before joining", "joining") else gone
        case "exception in a rank":
            named = rf"{who} ended; it said: .*{PLANTED}|{who}: .*{PLANTED}"
            if case.launcher == "torchrun":
                named += rf"|{by_torchrun}1 "
            if case.place in ("before joining", "leaving"):
                named += rf"|{gone} \(seen by the launcher\); ended with exit code 1|{absent}"
            return named
        case "a rank exits without a word":
            if launched:
                return rf"{gone} \(seen by the launcher\); ended with exit code {EXIT_CODE}"
            return rf"{gone}|{absent}" if case.place in ("before joining", "joining") else gone
        case "SIGSTOP of a rank":
            return rf"{gone} \(seen by rank|{absent}"
        case "a rank beyond the time-out":
            return rf"{who} did not come in time \(seen by rank"
        case "another version on a rank":
            return rf"{case.detail}: rank {other} has .*, rank 0 has "
        case "a rank that never starts":
            return absent
        case "two processes as one rank":
            return rf"RANK: {rank} is taken by process \d+ of "
        case "another configuration on a rank":
            if case.detail == "another seed":
                return rf"configuration: rank {other} has \w+, rank 0 has "
            return rf"({who} ended; it said: )?parallel: {world + 1} ranks are configured, {world} were started"
        case "an unreadable configuration on a rank":
            return rf"{who} ended; it said: \S*other\.yaml: |^sparsering: \S*other\.yaml: "
        case "a full disk of a rank":
            return rf"{who}.*(File too large|No space left|file too large|no space left)"
        case "a full disk of all ranks":
            return rf"rank \d+ of {world}.*(No space left|no space left|File too large|file too large)"
        case "a port that is taken":
            return rf"MASTER_PORT: {seen.port}: nothing can listen there" + (
                "|EADDRINUSE|address already in use" if case.launcher == "torchrun" else "")  # fmt: skip
        case "exception in the launcher":
            return rf"{case.detail}: {PLANTED}"
    return ""


def named(case: Case, seen: Seen) -> bool:
    """Whether a line names the rank and the cause."""
    return re.search(expected(case, seen), seen.said, re.MULTILINE) is not None


def wrongly_blamed(case: Case, seen: Seen) -> list[str]:
    """Return ranks that a line blames though the fault was not theirs."""
    if case.kind == "a full disk of all ranks":
        return []
    compared = case.kind in ("another version on a rank", "another configuration on a rank")
    blamed = {rank for ranks in BLAMED.findall(seen.said) for rank in ranks.split(", ")}
    # Who refuses what differs says so, too: both are named.
    return [] if compared else sorted(blamed - {f"rank {case.rank}"})


def problems(case: Case, seen: Seen) -> list[str]:
    """Return what is not as it must be."""
    found = []
    kind = KINDS[case.kind]
    if not seen.fired:
        found.append("the fault never came")
    if None in seen.codes.values():
        found.append("it had to be killed")
    elif seen.seconds > limit_s(case):
        found.append(f"it took longer than {limit_s(case):g} s")
    failed = [code for code in seen.codes.values() if code != 0]
    if kind.unharmed and failed:
        found.append("a run that was not harmed failed")
    refused_alone = case.kind == "two processes as one rank" and failed == [2]  # it came when all others had begun
    came_late = (  # when some rank had done all, which changes nothing for it
        case.kind == "Ctrl-C of ranks started by hand" and case.place == "leaving"
        and set(seen.codes.values()) <= {0, 128 + signal.SIGINT} and list(seen.complete)[-1:] == [STEPS]
    )  # fmt: skip
    if not kind.unharmed and len(failed) < len(seen.codes) and not refused_alone and not came_late:
        found.append("exit code 0")
    if expected(case, seen) and not named(case, seen):
        found.append("rank or cause not named" if could_know(case) else "cause not named")
    if blamed := wrongly_blamed(case, seen):
        found.append(f"blamed {', '.join(blamed)}")
    if seen.left:
        found.append(f"left running: {', '.join(seen.left)}")
    if seen.listening:
        found.append(f"{seen.listening} sockets still listen")
    if not seen.next_start_right:
        found.append(f"the next start: {seen.next_start}")
    return found


def first_line(said: str) -> str:
    """Return the one line that a user would read first: ours, else the last one of a traceback."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    ours = [line for line in lines if line.startswith("sparsering: ")]
    return (ours or lines[-1:] or [""])[0][:300]
