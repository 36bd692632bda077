"""What every buffer of a rank holds, followed symbolically through its program.

One rank at a time is enough. A transfer states its shard on both ends alike, and here its source is held to send just
that shard; so what a destination receives is known without looking at the source. Partial sums (dkv, out) are moved
whole, never copied and never overwritten, and may only be added to a sum of the same shard; so once no rank is left
with one outside its home, every contribution has arrived home exactly once. A sum that lands without being added
anywhere is the slot's content, to which tasks and transfers may add before it moves on.

K/V and queries: a slot's content is a shard, and kept slots hold theirs when forward ends and when backward begins.
Columns: the rank's own rows (or gradients), then those of all ranks.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import accumulate

from ..schedule.schedule import ALL_RANKS, COLUMNS_HOME, KEPT, GroupCall, Schedule, ShardId, Task, Transfer, slots_from
from .rules import SUMS, Rules, Site, is_own

OWN_COLUMNS = "the rank's own columns"
ALL_COLUMNS = "all columns"
COLUMN_GRADIENTS = "gradients of columns"

Content = ShardId | str | None
Held = list[tuple[str, ShardId]]  # slots and the shards that they give or take


@dataclass(slots=True)
class _Slot:
    """A buffer: what it holds or is about to receive, and what is in flight from and to it."""

    content: Content = None
    incoming: Transfer | None = None
    outgoing: list[Transfer] = field(default_factory=list)
    spans: list[list[int]] = field(default_factory=list)  # [first, last] phases in use


def check_contents(rules: Rules, rank: int) -> int:
    """Follow the buffers of `rank`; return the bytes in use at once at their peak, its own data excluded.

    Raises ScheduleError when something is used before it arrives, overwritten while in use, not what a task or
    transfer claims, or lost.
    """
    return _Walk(rules.schedule, rules, rank).run()


class _Walk:
    def __init__(self, schedule: Schedule, rules: Rules, rank: int) -> None:
        self.schedule, self.rules, self.rank = schedule, rules, rank
        self.forward = schedule.direction == "forward"
        self.slots = {name: _Slot() for name in rules.buffers}
        self.in_flight: dict[str, Transfer] = {}
        self.phase = 0
        if not self.forward:
            for name, shard in schedule.kept(rank).items():
                self.slots[name].content = shard
                self._touch(name)
        if COLUMNS_HOME in self.slots:  # backward keeps what forward gathered
            self.slots[COLUMNS_HOME].content = OWN_COLUMNS if self.forward else ALL_COLUMNS

    def run(self) -> int:
        phases = self.schedule.phases(self.rank)
        for phase in phases:
            self.phase = phase.index
            for name in phase.waits:
                self._wait(name)
            for call in phase.group_calls:
                self._launch(call)
            for task in phase.tasks:
                self._compute(task)
        self._check_end()
        return self._peak_bytes(len(phases))

    def _site(self, about: Task | Transfer | str) -> Site:
        return Site(self.rank, self.phase, about)

    def _touch(self, name: str, *, fresh: bool = False) -> None:
        spans = self.slots[name].spans
        if not spans or (fresh and spans[-1][1] < self.phase):
            spans.append([self.phase, self.phase])
        spans[-1][1] = self.phase

    # transfers

    def _ends(self, transfer: Transfer) -> tuple[Held, Held]:
        """Return what this rank gives of its slots and what it takes into them; neither for columns, summed in place.

        An all-gather fills a slot per rank. A reduce-scatter empties one per rank, the sum of that rank's shard each;
        one of every rank lands at its owner, added up.
        """
        if transfer.kind == "columns":
            return [], []
        if transfer.source != ALL_RANKS:
            assert transfer.shard is not None
            gives = transfer.source == self.rank and not is_own(transfer.source_buffer)
            takes = transfer.destination == self.rank
            return ([(transfer.source_buffer, transfer.shard)] * gives, [(transfer.buffer, transfer.shard)] * takes)
        head_group = 0 if transfer.shard is None else transfer.shard.head_group
        shards = [ShardId(sequence_part=rank, head_group=head_group) for rank in range(self.schedule.world_size)]
        if transfer.transport == "all_gather":
            return [], list(zip(slots_from(transfer.buffer, len(shards)), shards, strict=True))
        given = list(zip(slots_from(transfer.source_buffer, len(shards)), shards, strict=True))
        return given, [(transfer.buffer, shards[self.rank])]

    def _launch(self, call: GroupCall) -> None:
        """Sends first: the transfers of a call are in flight together, so none forwards what another receives."""
        for transfer in call.transfers:
            if transfer.kind == "columns":
                self._launch_sum(transfer)
            elif transfer.source == self.rank and is_own(transfer.source_buffer):
                self._require_own(self._site(transfer), transfer.source_buffer, transfer.shard)
            self._give(transfer)
            if transfer.source == ALL_RANKS:
                self._take(transfer)
        for transfer in call.transfers:
            if transfer.destination == self.rank:
                self._take(transfer)
        self.in_flight |= {transfer.id: transfer for transfer in call.transfers}

    def _launch_sum(self, transfer: Transfer) -> None:
        site, name = self._site(transfer), transfer.buffer
        self._require_idle(site, name)
        self._require_content(site, name, OWN_COLUMNS if self.forward else COLUMN_GRADIENTS)
        self.slots[name].incoming = transfer
        self._touch(name)

    def _give(self, transfer: Transfer) -> None:
        site = self._site(transfer)
        for name, shard in self._ends(transfer)[0]:
            slot = self.slots[name]
            if transfer.source == ALL_RANKS:
                self._require_idle(site, name)
            elif slot.incoming is not None:
                self._check_forward(site, slot.incoming, transfer)
            if slot.outgoing and transfer.kind in SUMS:
                raise site.broken(f"{name} is already being sent by {slot.outgoing[0].id}")
            self._require_content(site, name, shard)
            slot.outgoing.append(transfer)
            self._touch(name)

    def _check_forward(self, site: Site, incoming: Transfer, transfer: Transfer) -> None:
        """Only a later call of the same communicator may send what has not been waited for: it runs after it."""
        fifo = incoming.communicator == transfer.communicator and incoming.transport == transfer.transport == "p2p"
        site.require(fifo, f"sends {transfer.source_buffer} before {incoming.id} has arrived")
        site.require(incoming.accumulate_into is None, f"sends {incoming.id} on before it is added")
        # Rounding is no part of the communicator's queue: it happens when the call is launched.
        site.require(not transfer.narrow, f"rounds {transfer.source_buffer} before {incoming.id} has arrived")

    def _take(self, transfer: Transfer) -> None:
        site = self._site(transfer)
        for name, shard in self._ends(transfer)[1]:
            self._require_idle(site, name)
            # Backward may run again over a graph that was retained: what forward kept stays.
            site.require(self.forward or not name.startswith(KEPT), f"overwrites {name}, which forward kept")
            slot = self.slots[name]
            if transfer.kind in SUMS and slot.content is not None:
                raise site.broken(f"overwrites {slot.content} in {name}, which was not sent on")
            slot.content, slot.incoming = shard, transfer
            self._touch(name, fresh=True)

    def _wait(self, name: str) -> None:
        site = self._site(f"transfer {name}")
        site.require(name in self.in_flight, "waited for before it is launched")
        transfer = self.in_flight.pop(name)
        gives, takes = self._ends(transfer)
        for given, _ in gives:
            self.slots[given].outgoing.remove(transfer)
            if transfer.kind in SUMS:
                self.slots[given].content = None
            self._touch(given)
        if transfer.kind == "columns":
            takes = [(transfer.buffer, ShardId(sequence_part=self.rank))]
            self.slots[transfer.buffer].content = ALL_COLUMNS
        for taken, shard in takes:
            self.slots[taken].incoming = None
            self._touch(taken)
            if transfer.accumulate_into is not None:
                self.slots[taken].content = None
                self._add(site, transfer.accumulate_into, shard)

    # tasks

    def _compute(self, task: Task) -> None:
        site = self._site(task)
        self._read(site, task.query_buffer, task.query)
        self._read(site, task.key_buffer, task.key)
        self._add(site, task.out_buffer, task.query)
        if task.grad_buffer is not None:
            self._add(site, task.grad_buffer, COLUMN_GRADIENTS if task.key is None else task.key)

    def _read(self, site: Site, name: str, shard: ShardId | None) -> None:
        if shard is not None and is_own(name):
            self._require_own(site, name, shard)
            return
        slot = self.slots[name]
        if slot.incoming is not None:
            raise site.broken(f"reads {name} before {slot.incoming.id} has arrived")
        self._require_content(site, name, ALL_COLUMNS if shard is None else shard)
        self._touch(name)

    def _add(self, site: Site, name: str, content: Content) -> None:
        """Add a contribution to the partial sum in a buffer, which an empty one starts."""
        if isinstance(content, ShardId) and is_own(name):
            if content.sequence_part != self.rank:
                raise site.broken(f"{name} is no home of {content}")
            return
        self._require_idle(site, name)
        slot = self.slots[name]
        if slot.content not in (None, content):
            raise site.broken(f"{name} holds {slot.content}, not {content}")
        if slot.content is not None and self.rules.buffers[name].narrow:
            raise site.broken(f"adds to {name}, which holds rounded sums")
        self._touch(name, fresh=slot.content is None)
        slot.content = content

    # rules

    def _require_own(self, site: Site, name: str, shard: ShardId | None) -> None:
        if shard is None or shard.sequence_part != self.rank:
            raise site.broken(f"{name} does not hold {shard}")

    def _require_idle(self, site: Site, name: str) -> None:
        slot = self.slots[name]
        flight = slot.outgoing[0] if slot.outgoing else slot.incoming
        if flight is not None:
            raise site.broken(f"writes {name} while {flight.id} is in flight")

    def _require_content(self, site: Site, name: str, expected: Content) -> None:
        held = self.slots[name].content
        if held != expected:
            raise site.broken(f"{name} holds {'nothing' if held is None else held}, not {expected}")

    def _check_end(self) -> None:
        for name, transfer in self.in_flight.items():
            raise self._site(f"transfer {name}").broken(f"still in flight to {transfer.buffer} at the end")
        for name, slot in self.slots.items():
            left = self.rules.buffers[name].kind in SUMS or slot.content == COLUMN_GRADIENTS
            if left and slot.content is not None:
                raise self._site(f"buffer {name}").broken(f"{slot.content} never arrives home")
        for name, shard in self.schedule.kept(self.rank).items() if self.forward else ():
            self._require_content(self._site(f"buffer {name}"), name, shard)
            self._touch(name)

    def _peak_bytes(self, phases: int) -> int:
        change = [0] * (phases + 1)
        for name, slot in self.slots.items():
            for first, last in [] if is_own(name) else slot.spans:
                change[first] += self.rules.buffers[name].capacity_bytes
                change[last + 1] -= self.rules.buffers[name].capacity_bytes
        return max(accumulate(change))
