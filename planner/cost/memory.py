"""Bytes that one layer's attention needs on a rank under a schedule (batch of one), before anything is run.

Counted is what runtime/attention/planned.py holds when backward ends, which is when it holds most: tensors of the
layer, and the slots, kept through both directions. Kernels need little in passing, but for flash-attn-4: float32
accumulators, 16-bit gradients and copies of a launch, and its tables; and but for heads that are padded: copies of all
that a launch reads, and accumulators of their size; and but for masks that list their blocks: lists of tiles, a copy of
the mask the other way round, and shares of the longest key tiles' gradients. Not counted: indexes of diagonals (about
1 % where shards are long), and whatever else lives on the GPU.

Shape legend: S tokens of a shard, H query heads, D head dim; e bytes of an element, a bytes of an accumulator.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass, replace

from ..schedule.backends import kernel_head_dim
from ..schedule.launches import launches_of
from ..schedule.schedule import COLUMNS_HOME, HOMES, Phase, Schedule, Task
from ..schedule.shape import AttentionShape

# Backends that are, or may turn out to be, flash-attn-4; and what its tables are of: mask blocks, bytes of an
# entry; those of one launch are kept up to a size, for both directions, and never larger than another.
FLASH4_BACKENDS = frozenset({"flash4", "fastest"})
PROGRAMS_WANTED, TILES_TOGETHER = 4 * 132, 4096  # of its backward on H100 and H200; see kernels/flash4/fold.py
TABLE_BLOCK_TOKENS, TABLE_ENTRY_BYTES = 128, 4
MOST_RANKS = 64
KEPT_TABLE_LIMIT_BYTES, TABLE_LIMIT_BYTES = 72 << 20, 160 << 20
# Triton's index of masks that list their blocks, and how its backward shares out key tiles that many queries attend:
# see kernels/index/device_lists.py and kernels/triton/gradients.py. Above a size the mask's copy the other way
# round was found at the peak beside the mask: on ranks of eight it is right to 1 %; on four it is 6 % too much.
LISTING_BACKENDS = frozenset({"triton", "fastest"})
LIST_ENTRY_BYTES, SPLIT_ROWS, SPLIT_PIECES, SPLIT_LIMIT_BYTES = 4, 16, 32, 128 << 20
COPY_AT_PEAK_BYTES = 64 << 20


@dataclass(frozen=True, kw_only=True)
class LayerMemory:
    """Bytes on one rank at the peak of a step (forward and backward of one layer) with one schedule's slots.

    home_bytes: the rank's own q, k, v, out, dout, log-sum-exp, delta; dq, dk and dv as they are summed and as they are
    returned, which is twice where the types differ
    columns_bytes: gathered K and V of all columns and their gradients
    buffer_bytes: the schedule's slots for other ranks' data, the layer's own kept ones among them, and the copy of K/V
    that others pull
    kept_bytes: the kept slots of all other layers, which wait for their backward
    workspace_bytes: what kernels hold in passing beyond the returned gradients, which they make room for, and gradients
    rounded to be sent
    index_bytes: what masks that list their blocks take beside themselves, the shares of gradients included
    """

    home_bytes: int
    columns_bytes: int
    buffer_bytes: int
    kept_bytes: int = 0
    workspace_bytes: int = 0
    index_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        """All of it."""
        held = self.home_bytes + self.columns_bytes + self.buffer_bytes + self.kept_bytes
        return held + self.workspace_bytes + self.index_bytes


def layer_memory(
    schedule: Schedule, shape: AttentionShape, *, layers: int = 1, backend: str = "triton", reordered: bool = False,
    listed_block_tokens: int | None = None,
) -> LayerMemory:  # fmt: skip
    """Return the bytes of a step on every rank, as far as this direction's slots are the larger ones.

    layers: of the model; each of them keeps its own K/V where the schedule keeps any. backend: of the kernels.
    reordered: whether heads are in an order of the plan's: then there are second copies of q, k, v, out and dout.
    listed_block_tokens: the size of mask blocks where masks list theirs one by one.

    A step needs the larger total of its two directions, which share an arena for their slots.
    """
    q_bytes = shape.tokens_per_rank * shape.heads * shape.head_dim * shape.element_bytes
    dq_bytes = q_bytes * shape.accumulator_bytes // shape.element_bytes
    row_bytes = shape.tokens_per_rank * shape.heads * shape.accumulator_bytes  # log-sum-exp or delta
    home_bytes = 3 * q_bytes + shape.kv_bytes + 2 * row_bytes + dq_bytes + shape.dkv_bytes
    returned_bytes = q_bytes + shape.kv_bytes if shape.accumulator_bytes != shape.element_bytes else 0
    home_bytes += _group_bytes(schedule, shape, q_bytes, dq_bytes) or returned_bytes
    home_bytes += 3 * q_bytes + shape.kv_bytes if reordered else 0
    # Slots for results that change ranks need no room: accumulators, twice as large, were freed for them.
    results = [buffer for buffer in schedule.buffers if buffer.kind == "out" and buffer.name not in HOMES]
    # Gradients that wait, rounded, to be sent; every rank sends alike.
    narrow = {buffer.name for buffer in schedule.buffers if buffer.narrow}
    calls = [call for phase in schedule.phases(0) for call in phase.group_calls]
    rounded = {transfer.source_buffer for call in calls for transfer in call.transfers if transfer.narrow}
    workspace_bytes = max(0, _workspace_bytes(schedule, shape, backend, narrow) - returned_bytes)
    return LayerMemory(
        home_bytes=home_bytes,
        columns_bytes=shape.columns_bytes("forward") + shape.columns_bytes("backward"),
        buffer_bytes=schedule.buffer_bytes - sum(buffer.capacity_bytes for buffer in results),
        kept_bytes=(layers - 1) * schedule.kept_bytes,
        workspace_bytes=workspace_bytes + (shape.kv_bytes if rounded - narrow else 0),
        index_bytes=0 if listed_block_tokens is None else _listed_bytes(shape, backend, listed_block_tokens),
    )


def _listed_bytes(shape: AttentionShape, backend: str, block_tokens: int) -> int:
    """Return what a layer's listed mask takes on a rank while its backward runs, the mask itself excepted.

    Lists have room for every causal pair of the rank's queries, and of its keys; half of all pairs are causal.
    """
    if backend not in LISTING_BACKENDS:
        return 0
    tiles = -(-shape.tokens_per_rank // block_tokens)
    blocks = tiles * shape.world_size
    bits = shape.heads * blocks * blocks
    lists = 2 * LIST_ENTRY_BYTES * shape.heads * tiles * blocks // 2
    piece = 2 * shape.kv_heads * SPLIT_ROWS * block_tokens * shape.head_dim * shape.accumulator_bytes
    shares = piece * min(SPLIT_PIECES, SPLIT_LIMIT_BYTES // piece)
    return lists + bits * (1 + (bits > COPY_AT_PEAK_BYTES)) + shares


def _group_bytes(schedule: Schedule, shape: AttentionShape, q_bytes: int, dq_bytes: int) -> int:
    """Return what a rank that computes heads by groups holds beside what all hold, 0 for others.

    dq of its own queries lands by heads. Beside it, when the last part's dq is ended, a slot of each kind for its own
    tensors' heads: queries, keys, their gradients, and that dq. Or when the first part begins, while dq is small: what
    is sent, which is copied, queries of all other groups and K/V of all; whichever is more.
    """
    slots = {buffer.kind: buffer.capacity_bytes for buffer in schedule.buffers if buffer.name not in HOMES}
    if "q" not in slots:
        return 0
    groups = schedule.num_heads // _launched_heads(schedule)
    begun = any(buffer.name == COLUMNS_HOME for buffer in schedule.buffers)
    first = slots["q"] + dq_bytes // groups + slots.get("dkv", 0) if begun else 0
    beginning = (groups - 1) * slots["q"] + shape.kv_bytes + first - dq_bytes
    return q_bytes + max(beginning, sum(slots.values()))


def _launched_heads(schedule: Schedule) -> int:
    """Return how many heads a launch computes; every rank's compute as many."""
    first, last = next(task.heads for phase in schedule.phases(0) for task in phase.tasks)
    return last - first


def _workspace_bytes(schedule: Schedule, shape: AttentionShape, backend: str, narrow: Set[str]) -> int:
    """Return what a backward launch holds at most: of flash-attn-4, with the tables of all; of padded heads; else 0.

    narrow: names of slots that launches write rounded, with no copy of their own. Looked at are the ranks that may
    launch most: all that differ, or of very many the first and the last, which causality favours.
    """
    padded = kernel_head_dim(backend, shape.head_dim) != shape.head_dim
    if schedule.direction != "backward" or not (padded or backend in FLASH4_BACKENDS):
        return 0
    heads, held = _launched_heads(schedule), _padded_bytes if padded else _flash4_bytes
    launched = replace(shape, heads=heads, kv_heads=max(1, shape.kv_heads * heads // shape.heads))
    ranks = schedule.different_ranks
    ranks = ranks if len(ranks) <= MOST_RANKS else (0, schedule.world_size - 1)
    return max(held(schedule.phases(rank), launched, narrow) for rank in ranks)


def _padded_bytes(phases: Sequence[Phase], shape: AttentionShape, narrow: Set[str]) -> int:
    """Return what a launch of padded heads holds: copies of q, dout, K and V, columns, and room for all gradients.

    Only Triton's launches pad.
    """
    element, accumulator = shape.element_bytes, shape.accumulator_bytes
    wide, held = kernel_head_dim("triton", shape.head_dim), [0]
    columns_bytes = 2 * shape.columns_capacity * shape.heads * wide * (element + accumulator)
    launches = [tasks for phase in phases for tasks in launches_of(phase.tasks, backend="triton")]
    for tasks in launches:
        names = _slots_of(tasks)
        of_keys = element + (element if narrow >= set(names) else accumulator)
        row_bytes = shape.heads * (2 * element + accumulator) + 2 * len(names) * shape.kv_heads * of_keys
        attends_columns = any(task.key is None for task in tasks)
        held.append(shape.tokens_per_rank * wide * row_bytes + columns_bytes * attends_columns)
    if launches:  # the last launch writes dq as it is returned, which has to be there already
        held[-1] += shape.tokens_per_rank * shape.head_dim * shape.heads * element
    return max(held)


def _flash4_bytes(phases: Sequence[Phase], shape: AttentionShape, narrow: Set[str]) -> int:
    """Return what a launch of flash-attn-4 holds for dq, dk, dv and copies of q and dout, and the tables of all."""
    element, accumulator, group = shape.element_bytes, shape.accumulator_bytes, shape.heads // shape.kv_heads
    tiles = -(-shape.tokens_per_rank // TABLE_BLOCK_TOKENS)
    launches = [_slots_of(tasks) for phase in phases for tasks in launches_of(phase.tasks, backend="flash4")]
    pays = sum(map(len, launches)) > 1  # a copy for one launch of the own shard does not
    parts = len({task.query for phase in phases for task in phase.tasks})  # each keeps its own copy
    copied_bytes, held = 0, [0]  # over tokens of a shard and head dim
    for names in launches:
        lists = shape.heads * tiles * len(names)
        together = heads_together(group=group, lists=lists, tiles=tiles) if pays else 1
        if together > 1:  # q and dout, from the first launch that wants them on
            copied_bytes = parts * 2 * shape.heads * element
        of_keys = (accumulator if together < group else 0) + (0 if narrow >= set(names) else element)
        row_bytes = shape.heads * (accumulator + element) + 2 * len(names) * shape.kv_heads * of_keys
        held.append(row_bytes + copied_bytes if names else 0)
    if launches and launches[-1]:  # the last launch writes dq as it is returned, which has to be there already
        held[-1] += shape.heads * element
    tables = [TABLE_ENTRY_BYTES * shape.heads * tiles * tiles * len(names) for names in launches]
    tables_bytes = 2 * sum(size for size in tables if size <= KEPT_TABLE_LIMIT_BYTES)
    tables_bytes += max([min(size, TABLE_LIMIT_BYTES) for size in tables if size > KEPT_TABLE_LIMIT_BYTES], default=0)
    return shape.tokens_per_rank * shape.head_dim * max(held) + tables_bytes


def _slots_of(tasks: Sequence[Task]) -> list[str]:
    """Return the slots for dK/dV of a launch, one for every key shard that it reads."""
    return [str(task.grad_buffer) for task in tasks if task.key is not None]


def heads_together(*, group: int, lists: int, tiles: int) -> int:
    """Return how many query heads of a K/V head flash-attn-4's backward takes as one; see kernels/flash4/fold.py."""
    if group * tiles > TILES_TOGETHER:
        return 1
    return max((n for n in range(1, group + 1) if group % n == 0 and lists // n >= PROGRAMS_WANTED), default=1)
