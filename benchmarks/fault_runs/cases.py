"""Which faults are planted where: every kind with its places and launchers, and a seeded choice of so many of them.

What a kind is expected to look like from outside stands beside it, in words of the messages that users see.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

# Functions that stand for a place, each called by every rank; a place within training is struck in its second or third
# step, others at the first call.
STARTING = {
    "before joining": "sparsering.runtime.comm.mesh:join",
    "joining": "sparsering.runtime.comm.roll_call:roll_call",
    "preparing": "sparsering.runtime.train.setup:set_up",
    "building the model": "sparsering.runtime.train.model:shard_model",
}
TRAINING = {
    "reading data": "sparsering.runtime.data.shards:TokenData.at_step",
    "FSDP gather": "torch.distributed.fsdp._fully_shard._fsdp_collectives:foreach_all_gather",
    "forward": "sparsering.runtime.attention.planned:PlannedAttention.forward",
    "backward": "sparsering.runtime.attention.planned:PlannedAttention.backward",
    "FSDP reduce": "torch.distributed.fsdp._fully_shard._fsdp_collectives:foreach_reduce",
    "self-check": "sparsering.runtime.train.selfcheck.check:SelfCheck.judge",
    "optimizer": "torch.optim.adamw:AdamW.step",
    "metrics": "sparsering.runtime.train.metrics:Outputs.write",
}
SAVING = {
    "checkpoint, gathering": "sparsering.runtime.train.checkpoint:Checkpointer.save",
    "checkpoint, writing": "torch.distributed.checkpoint.filesystem:_write_item",
    "checkpoint, sealing": "sparsering.runtime.train.checkpoint:Checkpointer._seal",
}
ENDING = {"leaving": "sparsering.runtime.comm.mesh:leave"}
RUNNING = {
    "before joining": STARTING["before joining"], "joining": STARTING["joining"], "forward": TRAINING["forward"],
    "backward": TRAINING["backward"], "leaving": ENDING["leaving"],
}  # fmt: skip
PLACES = STARTING | TRAINING | SAVING | ENDING
ANYWHERE, AT_WORK = tuple(PLACES), (*TRAINING, *SAVING)
JOINED = ("preparing", "building the model", *AT_WORK)
STEPS = 4  # that a training is to make
LAUNCHERS = ("train", "torchrun", "by hand", "run")
ERRORS = ("OSError", "RuntimeError", "ValueError", "KeyError", "AssertionError", "MemoryError", "TypeError")


@dataclass(frozen=True, kw_only=True)
class Case:
    """One run and its fault.

    launcher: "train" and "run" are the verbs, which start ranks; "by hand" starts each rank as a cluster's scheduler
    would; started: "exec" for programs as users start them, "fork" for `forked.py`. steps: of training, before the
    fault; timeout_s, patience_s: of the configuration.
    """

    number: int
    kind: str
    place: str
    launcher: str
    rank: int
    ranks: int
    device: str = "cpu"
    started: str = "exec"
    detail: str = ""
    steps: int = 0
    attention: str = "gather"
    asynchronous: bool = False
    timeout_s: float = 60.0
    patience_s: float | None = None

    @property
    def backend(self) -> str:
        """What carries the collectives."""
        return "nccl" if self.device == "cuda" else "gloo"


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A kind of fault: how many of 200 runs, by which launchers, where, and in what variants.

    silent: the others notice by a time-out alone. unharmed: the run goes on, and ends well.
    """

    runs: int
    launchers: Sequence[str]
    places: Sequence[str]
    details: Sequence[str] = ("",)
    silent: bool = False
    unharmed: bool = False
    gpu_runs: int = 0


KINDS = {
    "SIGKILL of a rank": Kind(runs=40, launchers=LAUNCHERS, places=ANYWHERE, gpu_runs=5),
    "exception in a rank": Kind(runs=36, launchers=LAUNCHERS, places=ANYWHERE, details=ERRORS, gpu_runs=4),
    "SIGTERM or SIGHUP of a rank": Kind(runs=10, launchers=("train", "train", "by hand"), places=ANYWHERE,
                                        details=("SIGTERM", "SIGHUP"), gpu_runs=1),
    "a rank exits without a word": Kind(runs=8, launchers=("train", "by hand"), places=ANYWHERE, gpu_runs=1),
    "SIGSTOP of a rank": Kind(runs=14, launchers=("train",), places=("joining", *JOINED), silent=True, gpu_runs=2),
    "a rank beyond the time-out": Kind(runs=8, launchers=("train", "by hand"), places=JOINED, silent=True, gpu_runs=1),
    "a slow rank within the time-out": Kind(runs=8, launchers=("train", "torchrun", "by hand"), places=ANYWHERE,
                                            unharmed=True, gpu_runs=1),
    "a signal to the launcher": Kind(runs=16, launchers=("train", "train", "torchrun", "run"), places=ANYWHERE,
                                     details=("SIGTERM", "SIGINT", "SIGHUP", "SIGKILL"), gpu_runs=2),
    "Ctrl-C of ranks started by hand": Kind(runs=4, launchers=("by hand",), places=ANYWHERE, details=("SIGINT",)),
    "exception in the launcher": Kind(runs=6, launchers=("train", "run"), places=ANYWHERE, details=("RuntimeError",)),
    "another version on a rank": Kind(runs=8, launchers=("train", "torchrun", "by hand", "run"), places=("start",),
                                      details=("sparsering", "torch", "numpy", "transformers"), gpu_runs=1),
    "a port that is taken": Kind(runs=5, launchers=("by hand", "torchrun"), places=("start",), silent=True),
    "a rank that never starts": Kind(runs=6, launchers=("by hand",), places=("start",), silent=True),
    "two processes as one rank": Kind(runs=4, launchers=("by hand",), places=("start",), silent=True),
    "another configuration on a rank": Kind(runs=6, launchers=("by hand", "train", "torchrun"), places=("start",),
                                            details=("another seed", "another number of ranks")),
    "an unreadable configuration on a rank": Kind(runs=7, launchers=("by hand", "train", "torchrun"),
                                                  places=("start",), details=("no such file", "not YAML")),
    "a full disk of a rank": Kind(runs=9, launchers=("train", "by hand", "torchrun"),
                                  places=("checkpoint, gathering", "checkpoint, sealing", "metrics"), gpu_runs=2),
    "a full disk of all ranks": Kind(runs=5, launchers=("train",), places=("checkpoint, writing",)),
}  # fmt: skip


def drawn(count: int, *, seed: int, gpus: int = 0, forked_share: float = 0.0) -> list[Case]:
    """Return so many runs, every kind in its share; the same seed gives the same runs.

    gpus: ranks are so many, each on a GPU; 0: two to four on CPUs. forked_share: of the runs that can be forked.
    """
    draw, cases = random.Random(seed), []
    wanted = {name: kind.gpu_runs if gpus else kind.runs for name, kind in KINDS.items()}
    for name, runs in _shares(wanted, count).items():
        combined = _combinations(KINDS[name], draw, gpus=gpus)
        for _ in range(runs):
            launcher, place, detail = next(combined)
            ranks = gpus or draw.choice((2, 2, 3, 3, 4))
            cases.append(_case(name, launcher, place, detail, draw, ranks=ranks, on_gpus=bool(gpus)))
    draw.shuffle(cases)
    forked = [place for place, case in enumerate(cases) if can_be_forked(case)]
    forked = set(draw.sample(forked, round(forked_share * len(forked))))
    return [replace(case, number=number, started="fork" if number in forked else "exec")
            for number, case in enumerate(cases)]  # fmt: skip


def can_be_forked(case: Case) -> bool:
    """Whether this run can be forked: torchrun starts programs, and CUDA wants processes of its own."""
    return case.launcher != "torchrun" and case.device == "cpu"


def _shares(wanted: dict[str, int], count: int) -> dict[str, int]:
    """Return how often each kind comes among `count`, as near to the wanted shares as whole numbers are."""
    whole = sum(wanted.values())
    exact = {name: count * one / whole for name, one in wanted.items()}
    shares = {name: int(one) for name, one in exact.items()}
    rest = sorted(exact, key=lambda name: shares[name] - exact[name])
    for name in rest[: count - sum(shares.values())]:
        shares[name] += 1
    return shares


def _combinations(kind: Kind, draw: random.Random, *, gpus: int) -> Iterator[tuple[str, str, str]]:
    """Yield (launcher, place, detail) for ever, each of the three as evenly as can be."""
    launchers = ("train",) if gpus else kind.launchers
    # Of the verbs' launchers, `train` is what users start most.
    weighted = [launcher for one in launchers for launcher in [one] * (5 if one == "train" else 1)]
    endless = [_evenly(values, draw) for values in (weighted, kind.places, kind.details)]
    pending: list[str] = []  # places that the launcher of their turn does not have
    while True:
        launcher, detail = next(endless[0]), next(endless[2])
        fitting = [place for place in pending if possible(launcher, place)]
        if fitting:
            place = fitting[0]
            pending.remove(place)
        else:
            while not possible(launcher, place := next(endless[1])):
                pending.append(place)
        yield launcher, place, detail


def told_by_timeout(kind: str, launcher: str, place: str) -> bool:
    """Whether only a time-out tells the others: so it does of a death while ranks wait at a store of their own."""
    return KINDS[kind].silent or (launcher == "by hand" and place in STARTING)


def possible(launcher: str, place: str) -> bool:
    """Whether a launcher's ranks pass a place."""
    return launcher != "run" or place in RUNNING or place == "start"


def _evenly(values: Sequence[str], draw: random.Random) -> Iterator[str]:
    while True:
        yield from draw.sample(list(values), len(values))


def _case(
    name: str, launcher: str, place: str, detail: str, draw: random.Random, *, ranks: int, on_gpus: bool
) -> Case:  # fmt: skip
    kind = KINDS[name]
    rank = draw.randrange(ranks)
    if name == "two processes as one rank":
        rank = max(rank, 1)  # another rank 0 finds the port taken, and the run goes on without it
    silent = told_by_timeout(name, launcher, place) and not kind.unharmed
    steps = draw.choice((2, 3)) if place in AT_WORK and launcher != "run" else 0
    patience_s = draw.choice((None, 8.0)) if kind.silent and place in JOINED else None
    return Case(
        number=0, kind=name, place=place, launcher=launcher, rank=rank, ranks=ranks,
        device="cuda" if on_gpus else "cpu", detail=detail, steps=steps,
        attention=draw.choice(("gather", "ring")), asynchronous=draw.random() < 0.5,
        timeout_s=(30.0 if on_gpus else 20.0) if silent else 60.0, patience_s=patience_s,
    )  # fmt: skip


def described(case: Case) -> dict[str, Any]:
    """Return a case as the beginning of a row."""
    return {
        "number": case.number, "fault": case.kind, "detail": case.detail, "place": case.place, "rank": case.rank,
        "ranks": case.ranks, "launcher": case.launcher, "backend": case.backend, "started": case.started,
        "attention": case.attention, "asynchronous": case.asynchronous, "steps_before": max(case.steps - 1, 0),
        "timeout_s": case.timeout_s, "patience_s": case.patience_s,
    }  # fmt: skip
