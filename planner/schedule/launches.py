"""Which tasks of a phase are one kernel launch: the runtime plays by this rule, evaluators price by it.

One long launch beats several short ones: out and dQ are read and written once, and no tail is left idle. Keys that lie
in neighbouring slots are one long key shard to kernels that take several; columns come first, where a backend attends
both kinds of keys at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from .backends import facts_of
from .schedule import HOMES, Phase, Task, slots_from


@dataclass(frozen=True, kw_only=True, slots=True)
class Launch:
    """Tasks that are one kernel launch. begins, ends: whether it is its rank's first, last that adds to out (dQ)."""

    tasks: tuple[Task, ...]
    begins: bool = True
    ends: bool = True


def launches_of(tasks: Sequence[Task], *, backend: str, batch: int = 1) -> list[tuple[Task, ...]]:
    """Cut a phase's tasks into kernel launches, in order. batch: sequences computed together.

    Tasks whose keys (and gradients) lie in neighbouring slots are one launch, where the backend joins keys; it may
    begin with the columns, where the backend fuses them. Others launch every task alone.
    """
    cut: list[list[Task]] = []
    for task in tasks:
        if cut and _joins(cut[-1], task, backend, batch):
            cut[-1].append(task)
        else:
            cut.append([task])
    return [tuple(together) for together in cut]


def rank_launches(phases: Sequence[Phase], *, backend: str) -> list[list[Launch]]:
    """Return the launches of each of a rank's phases, of one sequence at a time."""
    cut = [launches_of(phase.tasks, backend=backend) for phase in phases]
    sums = [_sum_of(tasks) for together in cut for tasks in together]
    first = {into: number for number, into in reversed(list(enumerate(sums)))}
    last = {into: number for number, into in enumerate(sums)}
    numbered = iter(enumerate(sums))

    def launch(tasks: tuple[Task, ...]) -> Launch:
        number, into = next(numbered)
        return Launch(tasks=tasks, begins=first[into] == number, ends=last[into] == number)

    return [[launch(tasks) for tasks in together] for together in cut]


def launch_name(tasks: Sequence[Task]) -> str:
    """Name a launch by its queries and all its keys: what spans of timelines are called."""
    keys = " ".join("columns" if task.key is None else f"k{task.key}" for task in tasks)
    return f"q{tasks[0].query} {keys}"


@lru_cache(maxsize=1 << 16)
def _adjoins(name: str, following: str) -> bool:
    return neighbours([name, following])


def neighbours(names: Sequence[str]) -> bool:
    """Whether these are slots of one pool, one after the other; a rank's own data (":home") is nobody's neighbour."""
    return not HOMES.intersection(names) and list(names) == slots_from(names[0], len(names))


def parse_slot(name: str) -> tuple[str, int]:
    """Return the pool of a slot and its number there."""
    prefix, _, number = name.partition(":")
    return prefix, int(number)


def _joins(launch: Sequence[Task], task: Task, backend: str, batch: int) -> bool:
    """Whether a task becomes part of the launch that the tasks before it make."""
    before = launch[-1]
    if task.key is None or _sum_of(launch) != _sum_of([task]):
        return False
    if before.key is None:
        return facts_of(backend).fuses_columns
    if not facts_of(backend).joins_keys or batch > 1 or not _adjoins(before.key_buffer, task.key_buffer):
        return False
    if before.grad_buffer is None or task.grad_buffer is None:
        return before.grad_buffer == task.grad_buffer
    return _adjoins(before.grad_buffer, task.grad_buffer)


def _sum_of(tasks: Sequence[Task]) -> tuple[object, ...]:
    """Name what a launch adds to: out (dQ) of some queries and heads."""
    query = tasks[0].query
    return query.sequence_part, query.head_group, tasks[0].heads, tasks[0].out_buffer
