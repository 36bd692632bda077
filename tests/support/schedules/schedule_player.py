"""Plays any schedule in a random order with contents that can be counted."""

from __future__ import annotations

import random
from collections import Counter

from sparsering.planner.schedule.schedule import ALL_RANKS, GroupCall, Schedule, Transfer, slots_from

Content = Counter[tuple[str, int, int]]


class Player:
    """Plays a schedule with contents that can be counted, transfers moving at random moments between launch and wait.

    Knows nothing of `check`: it waits, copies and adds, and fails on a deadlock.
    """

    def __init__(self, schedule: Schedule, chance: random.Random) -> None:
        self.schedule, self.chance = schedule, chance
        self.world = range(schedule.world_size)
        self.held: list[dict[str, Content]] = [
            {f"{kind}:home": Counter({(kind, r, 0): 1}) for kind in ("kv", "q")} for r in self.world
        ]
        self.place = [0 for _ in self.world]
        self.queues: dict[tuple[int, str], list[GroupCall]] = {}
        self.moved: dict[str, Content] = {}
        self.done: set[tuple[int, str]] = set()
        if schedule.direction == "backward":
            for rank, held in enumerate(self.held):
                held["columns:home"] = Counter({("columns", r, 0): 1 for r in self.world})
                for name, shard in schedule.kept(rank).items():
                    held[name] = Counter({("kv", shard.sequence_part, 0): 1})
        else:
            for rank, held in enumerate(self.held):
                held["columns:home"] = Counter({("columns", rank, 0): 1})

    def play(self) -> None:
        while any(self.place[rank] < len(self.schedule.phases(rank)) for rank in self.world):
            ready = [rank for rank in self.world if self._may_begin(rank)]
            ready_moves = self._moves()
            assert ready or ready_moves, "deadlock"
            pick = self.chance.randrange(len(ready) + len(ready_moves))
            if pick < len(ready):
                self._begin(ready[pick])
            else:
                self._move(ready_moves[pick - len(ready)])

    def _may_begin(self, rank: int) -> bool:
        phases = self.schedule.phases(rank)
        left = self.place[rank] < len(phases)
        return left and all((rank, name) in self.done for name in phases[self.place[rank]].waits)

    def _begin(self, rank: int) -> None:
        phase, held = self.schedule.phases(rank)[self.place[rank]], self.held[rank]
        self.place[rank] += 1
        transfers = {t.id: t for p in self.schedule.phases(rank) for c in p.group_calls for t in c.transfers}
        for transfer in (transfers[name] for name in phase.waits):
            if transfer.accumulate_into and transfer.source != rank:
                into = "dcolumns:sum" if transfer.kind == "columns" else transfer.accumulate_into
                held[into] = held.get(into, Counter()) + held.pop(transfer.buffer)
        for call in phase.group_calls:
            self.queues.setdefault((rank, call.communicator), []).append(call)
        for task in phase.tasks:
            key = task.key.sequence_part if task.key else -1
            assert set(held[task.key_buffer]) == (
                {("kv", key, 0)} if task.key else {("columns", r, 0) for r in self.world}
            )
            query = task.query.sequence_part
            assert set(held[task.query_buffer]) == {("q", query, 0)}
            held.setdefault(task.out_buffer, Counter())[("out", query, key)] += 1
            if task.grad_buffer:
                held.setdefault(task.grad_buffer, Counter())[("grad", query, key)] += 1

    def _moves(self) -> list[Transfer]:
        heads = {key: queue[0] for key, queue in self.queues.items() if queue}
        found: dict[str, list[int]] = {}
        transfers: dict[str, Transfer] = {}
        for (rank, _), call in heads.items():
            for transfer in call.transfers:
                if transfer.id not in self.moved:
                    found.setdefault(transfer.id, []).append(rank)
                    transfers[transfer.id] = transfer
        ends = {name: len(self.world) if t.source == ALL_RANKS else 2 for name, t in transfers.items()}
        return [transfers[name] for name in sorted(found) if len(found[name]) == ends[name]]

    def _move(self, transfer: Transfer) -> None:
        if transfer.kind == "columns":
            content = sum((self.held[rank][transfer.buffer] for rank in self.world), Counter())
            for rank in self.world:
                self.held[rank][transfer.buffer] = Counter(content)
        elif transfer.source == ALL_RANKS:
            content, gathers = Counter(), transfer.transport == "all_gather"
            slots = slots_from(transfer.buffer if gathers else transfer.source_buffer, len(self.world))
            for owner, slot in enumerate(slots):
                if gathers:
                    for rank in self.world:
                        self.held[rank][slot] = Counter(self.held[owner]["kv:home"])
                else:
                    sums = (self.held[rank].pop(slot) for rank in self.world)
                    self.held[owner][transfer.buffer] = sum(sums, Counter())
        else:
            source = self.held[transfer.source]
            moves = transfer.kind in ("dkv", "out")
            content = source.pop(transfer.source_buffer) if moves else source[transfer.source_buffer]
            assert transfer.buffer not in self.held[transfer.destination] or not moves, "gradients overwritten"
            self.held[transfer.destination][transfer.buffer] = Counter(content)
        self.moved[transfer.id] = content
        for (rank, _), queue in self.queues.items():
            if queue and all(t.id in self.moved for t in queue[0].transfers):
                self.done |= {(rank, t.id) for t in queue.pop(0).transfers}
