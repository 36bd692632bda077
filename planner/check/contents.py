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

from dataclasses import dataclass, field, replace

from ..schedule.schedule import COLUMNS_HOME, KEPT, GroupCall, Phase, Schedule, ShardId, Task, Transfer, slots_from
from .rules import SUMS, Rules, Site, is_own

OWN_COLUMNS = "the rank's own columns"
ALL_COLUMNS = "all columns"
COLUMN_GRADIENTS = "gradients of columns"

Content = ShardId | str | None


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


def _of_rank(transfer: Transfer, rank: int) -> ShardId:
    """Return the shard of a rank in what all take part in."""
    return ShardId(sequence_part=rank, head_group=0 if transfer.shard is None else transfer.shard.head_group)


class _Walk:
    def __init__(self, schedule: Schedule, rules: Rules, rank: int) -> None:
        self.schedule, self.rules, self.rank = schedule, rules, rank
        self.slots = {name: _Slot() for name in rules.buffers}
        self.in_flight: dict[str, Transfer] = {}
        self.phase = 0
        if schedule.direction == "backward":
            for name, shard in schedule.kept(rank).items():
                self.slots[name].content = shard
                self._touch(name)
        if COLUMNS_HOME in self.slots:  # backward keeps what forward gathered
            forward = schedule.direction == "forward"
            self.slots[COLUMNS_HOME].content = OWN_COLUMNS if forward else ALL_COLUMNS

    def run(self) -> int:
        phases = self.schedule.phases(self.rank)
        for phase in phases:
            self._play(phase)
        self._check_end()
        return self._peak_bytes(len(phases))

    def _play(self, phase: Phase) -> None:
        self.phase = phase.index
        for name in phase.waits:
            self._wait(name)
        for call in phase.group_calls:
            self._launch(call)
        for task in phase.tasks:
            self._compute(task)

    def _site(self, about: Task | Transfer | str) -> Site:
        return Site(self.rank, self.phase, about)

    def _touch(self, name: str, *, fresh: bool = False) -> None:
        spans = self.slots[name].spans
        if not spans or (fresh and spans[-1][1] < self.phase):
            spans.append([self.phase, self.phase])
        spans[-1][1] = self.phase

    # launches

    def _launch(self, call: GroupCall) -> None:
        """Sends first: the transfers of a call are in flight together, so none forwards what another receives."""
        for transfer in call.transfers:
            if transfer.kind == "columns":
                self._launch_sum(transfer)
            elif transfer.transport == "all_gather":
                self._launch_all_gather(transfer)
            elif transfer.transport == "reduce_scatter":
                self._launch_reduce_scatter(transfer)
            elif transfer.source == self.rank:
                self._launch_send(transfer)
        for transfer in call.transfers:
            if transfer.destination == self.rank:
                self._launch_receive(transfer)
        self.in_flight |= {transfer.id: transfer for transfer in call.transfers}

    def _launch_sum(self, transfer: Transfer) -> None:
        site, name = self._site(transfer), transfer.buffer
        expected = OWN_COLUMNS if self.schedule.direction == "forward" else COLUMN_GRADIENTS
        self._require_idle(site, name)
        self._require_content(site, name, expected)
        self.slots[name].incoming = transfer
        self._touch(name)

    def _launch_all_gather(self, transfer: Transfer) -> None:
        site = self._site(transfer)
        for part, name in enumerate(self._slots_of(transfer.buffer)):
            self._require_idle(site, name)
            self._require_not_kept(site, name)
            slot = self.slots[name]
            slot.content, slot.incoming = _of_rank(transfer, part), transfer
            self._touch(name, fresh=True)

    def _launch_reduce_scatter(self, transfer: Transfer) -> None:
        """Every slot holds the sum of its rank's shard; one of each lands at its owner, added up."""
        site = self._site(transfer)
        for part, name in enumerate(self._slots_of(transfer.source_buffer)):
            self._require_idle(site, name)
            self._require_content(site, name, _of_rank(transfer, part))
            self.slots[name].outgoing.append(transfer)
            self._touch(name)
        self._require_idle(site, transfer.buffer)
        slot = self.slots[transfer.buffer]
        site.require(slot.content is None, f"overwrites {slot.content} in {transfer.buffer}")
        slot.content, slot.incoming = _of_rank(transfer, self.rank), transfer
        self._touch(transfer.buffer, fresh=True)

    def _slots_of(self, first: str) -> list[str]:
        return slots_from(first, self.schedule.world_size)

    def _launch_send(self, transfer: Transfer) -> None:
        site, name = self._site(transfer), transfer.source_buffer
        assert transfer.shard is not None
        if is_own(name):
            site.require(transfer.shard.sequence_part == self.rank, f"{name} does not hold {transfer.shard}")
            return
        slot = self.slots[name]
        if slot.incoming is not None:
            self._check_forward(site, slot.incoming, transfer)
        if slot.outgoing and transfer.kind in SUMS:
            raise site.broken(f"{name} is already being sent by {slot.outgoing[0].id}")
        self._require_content(site, name, transfer.shard)
        slot.outgoing.append(transfer)
        self._touch(name)

    def _check_forward(self, site: Site, incoming: Transfer, transfer: Transfer) -> None:
        """Only a later call of the same communicator may send what has not been waited for: it runs after it."""
        fifo = incoming.communicator == transfer.communicator and incoming.transport == transfer.transport == "p2p"
        site.require(fifo, f"sends {transfer.source_buffer} before {incoming.id} has arrived")
        site.require(incoming.accumulate_into is None, f"sends {incoming.id} on before it is added")
        # Rounding is no part of the communicator's queue: it happens when the call is launched.
        site.require(not transfer.narrow, f"rounds {transfer.source_buffer} before {incoming.id} has arrived")

    def _launch_receive(self, transfer: Transfer) -> None:
        site, name = self._site(transfer), transfer.buffer
        self._require_idle(site, name)
        self._require_not_kept(site, name)
        slot = self.slots[name]
        if transfer.kind in SUMS and slot.content is not None:
            raise site.broken(f"overwrites {slot.content} in {name}, which was not sent on")
        slot.content, slot.incoming = transfer.shard, transfer
        self._touch(name, fresh=True)

    # waits

    def _wait(self, name: str) -> None:
        site = self._site(f"transfer {name}")
        site.require(name in self.in_flight, "waited for before it is launched")
        transfer = self.in_flight.pop(name)
        if transfer.kind == "columns":
            self._end_sum(site, transfer)
        elif transfer.transport == "all_gather":
            for name in self._slots_of(transfer.buffer):
                self.slots[name].incoming = None
                self._touch(name)
        elif transfer.transport == "reduce_scatter":
            for name in self._slots_of(transfer.source_buffer):
                self.slots[name].outgoing.remove(transfer)
                self.slots[name].content = None
                self._touch(name)
            self._end_receive(site, replace(transfer, shard=_of_rank(transfer, self.rank)))
        elif transfer.source == self.rank:
            self._end_send(transfer)
        else:
            self._end_receive(site, transfer)

    def _end_sum(self, site: Site, transfer: Transfer) -> None:
        slot = self.slots[transfer.buffer]
        slot.incoming = None
        self._touch(transfer.buffer)
        if transfer.accumulate_into is None:
            slot.content = ALL_COLUMNS
        else:
            slot.content = None
            self._add(site, transfer.accumulate_into, ShardId(sequence_part=self.rank))

    def _end_send(self, transfer: Transfer) -> None:
        if is_own(transfer.source_buffer):
            return
        slot = self.slots[transfer.source_buffer]
        slot.outgoing.remove(transfer)
        self._touch(transfer.source_buffer)
        if transfer.kind in SUMS:
            slot.content = None

    def _end_receive(self, site: Site, transfer: Transfer) -> None:
        slot = self.slots[transfer.buffer]
        slot.incoming = None
        self._touch(transfer.buffer)
        if transfer.accumulate_into is not None:
            slot.content = None
            self._add(site, transfer.accumulate_into, transfer.shard)

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
            if shard.sequence_part != self.rank:
                raise site.broken(f"{name} does not hold {shard}")
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

    def _require_idle(self, site: Site, name: str) -> None:
        slot = self.slots[name]
        flights = [*slot.outgoing, *([slot.incoming] if slot.incoming else [])]
        if flights:
            raise site.broken(f"writes {name} while {flights[0].id} is in flight")

    def _require_not_kept(self, site: Site, name: str) -> None:
        """Backward may run again over a graph that was retained: what forward kept stays."""
        kept = self.schedule.direction == "backward" and name.startswith(KEPT)
        site.require(not kept, f"overwrites {name}, which forward kept")

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

        if self.schedule.direction == "forward":
            for name, shard in self.schedule.kept(self.rank).items():
                self._require_content(self._site(f"buffer {name}"), name, shard)
                self._touch(name)

    def _peak_bytes(self, phases: int) -> int:
        change = [0] * (phases + 1)
        for name, slot in self.slots.items():
            for first, last in [] if is_own(name) else slot.spans:
                change[first] += self.rules.buffers[name].capacity_bytes
                change[last + 1] -= self.rules.buffers[name].capacity_bytes
        peak = held = 0
        for step in change:
            held += step
            peak = max(peak, held)
        return peak
