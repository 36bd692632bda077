"""Random configurations of attention and of training: plain values that can be written down and played again.

A configuration is a flat dictionary of JSON values with its own seed; `attention_case` makes a plan and a pattern of
one, the same on every process, so that ranks are sent the values alone.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from itertools import product
from typing import Any

import numpy as np

from ....planner.check.check import check_step
from ....planner.layouts.layout import Layout
from ....planner.layouts.registry import known_layouts, make_layout
from ....planner.plan import AttentionSpec, KernelSpec, ModelShape, PatternSpec, Plan, make_plan
from ....planner.schedule.pairs import pattern_pairs
from ....planner.schedule.placement import REGULAR_PLACEMENTS, Placement, balanced
from ....planner.schedule.schedule import DIRECTIONS, Communicator
from ....planner.schedule.workload import unit_load
from ....planner.specs import DType
from ....traces.errors import InputError, ScheduleError, UnsupportedError
from ....traces.pattern import LayerPattern
from ....traces.synthetic import GENERATORS, SyntheticSettings, synthesize

Values = dict[str, Any]
BLOCK_SIZES = (16, 64, 128)
# Of all processes: ranks that share a sequence, and replicas of them.
SPLITS = ((1, 1), (2, 1), (3, 1), (4, 1), (1, 2), (2, 2), (1, 4))
MOST_TOKENS = 1200
LEAST_EXACT_MULTIPLE = 64  # column capacities are multiples of it
HEADS = ((1, 1), (2, 1), (2, 2), (4, 2), (4, 4), (6, 3), (8, 2))
DTYPES: tuple[tuple[DType, int], ...] = (("float64", 6), ("float32", 2), ("bfloat16", 2))
# What every layout can be asked for.
PLAIN: Values = {
    "seq_len_tokens": 512, "block_size": 64, "heads": 12, "kv_heads": 12, "head_dim": 8, "dtype": "float64",
    "granularity_tokens": 64, "leave_out": False, "reorder_heads": False, "placement": "striped",
    "mask": "vertical-slash", "columns": 40,
}  # fmt: skip
SELECTORS: dict[str, dict[str, tuple[int | float, ...]]] = {
    "sink-window": {"sink_tokens": (0, 4, 30), "window_tokens": (16, 100, 512)},
    "vertical-slash": {"columns": (0, 16, 64), "slashes": (0, 40, 200), "sink_tokens": (0, 8),
                       "window_tokens": (8, 64)},
    "flex": {"column_mass": (0.5, 0.9), "column_cap": (32, 64), "slash_mass": (0.5, 0.9),
             "slash_cap": (64, 128)},
    "xattention": {"stride": (8, 16), "mass": (0.5, 0.9)},
    "block-mass": {"probe_stride": (4, 8), "least_mass": (0.02, 0.2)},
    "moba-block": {"chunk_tokens": (128, 256), "top_chunks": (1, 3)},
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class AttentionCase:
    """A plan and the pattern that it plays."""

    plan: Plan
    pattern: LayerPattern


def draw_attention(dice: random.Random) -> Values:
    """Return a configuration of one layer. It may be refused when its case is made: then draw again."""
    heads, kv_heads = dice.choice(HEADS)
    block_size = dice.choice(BLOCK_SIZES)
    names, weights = zip(*DTYPES, strict=True)
    world_size = dice.randint(1, 4)
    tokens = dice.randint(1, MOST_TOKENS)
    values: Values = {
        "kind": "attention",
        "seed": dice.randrange(1 << 31),
        "world_size": world_size,
        "mask": dice.choice(sorted(GENERATORS)),
        "seq_len_tokens": tokens,
        "block_size": block_size,
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": dice.choice((8, 16, 32, 64, 128)),
        "density": dice.choice((0.02, 0.1, 0.3, 1.0)),
        "columns": dice.choice((0, 0, 3, 40, 200)),
        "documents": dice.choice((0, 0, 2, 5)),
        "dtype": dice.choices(names, weights)[0],
        "batch": dice.choice((1, 1, 2)),
        "placement": dice.choice((*REGULAR_PLACEMENTS, "balanced")),
        "granularity_tokens": block_size * dice.choice((1, 1, 2)) if dice.random() < 0.8 else dice.choice((1, 7, 32)),
        "leave_out": dice.random() < 0.3,
        "reorder_heads": dice.random() < 0.3,
        "poison": dice.random() < 0.8,
        "launches": dice.choice(("one", "two")),  # how often the same layer is played in a row
    }
    forward = _draw_layout(dice, world_size)
    backward = forward if dice.random() < 0.5 else _draw_layout(dice, world_size)
    for way, layout in (("forward", forward), ("backward", backward)):
        values |= {way: layout.name, f"{way}_parameters": asdict(layout)}
    return values


def attention_case(values: Values) -> AttentionCase:
    """Return the plan and the pattern of a configuration.

    InputError, UnsupportedError or ScheduleError (directions that do not fit together) where there are none.
    """
    pattern = _pattern(values)
    placement = _placement(values, pattern)
    head_orders = None
    if values["reorder_heads"]:
        head_orders = (_order(values),)
    capacity = -(-pattern.max_columns // LEAST_EXACT_MULTIPLE) * LEAST_EXACT_MULTIPLE
    plan = make_plan(
        attention=AttentionSpec(
            model=ModelShape(layers=1, heads=values["heads"], kv_heads=values["kv_heads"], head_dim=values["head_dim"]),
            seq_len_tokens=values["seq_len_tokens"], block_size=values["block_size"], dtype=values["dtype"],
            columns_capacity=capacity,
        ),
        placement=placement,
        forward=make_layout(values["forward"], values["forward_parameters"]),
        backward=make_layout(values["backward"], values["backward_parameters"]),
        pattern=PatternSpec(source="trace"),
        kernels=KernelSpec(backend="blockwise"),
        pairs=pattern_pairs(pattern, placement) if values["leave_out"] else None,
        head_orders=head_orders,
    )  # fmt: skip
    check_step(*(plan.schedule(direction) for direction in DIRECTIONS))
    return AttentionCase(plan=plan, pattern=pattern)


def opening() -> Iterator[Values]:
    """Yield a configuration for every set of communicators that any draw asks for, so that all are open early.

    A process opens each once and keeps it, for every way of splitting into replicas anew: what it holds is flat from
    then on, not before.
    """
    dice, seen = random.Random(0), set()
    for context, data in SPLITS:
        trained = False
        for layout in _every_layout(context):
            asked = {(context, data, one) for one in communicators_of(layout, context)}
            if asked <= seen:
                continue
            seen |= asked
            if data == 1:
                yield _plain(layout, context, dice)
            else:
                trained = True
                yield _training_of(layout, context, data, dice)
        if not trained:  # a training run has groups beside those of its layout
            yield _training_of(make_layout("gather", {}), context, data, dice)


def _plain(layout: Layout, world_size: int, dice: random.Random) -> Values:
    """Return a configuration of a layer that is played by one layout both ways."""
    values = draw_attention(dice) | PLAIN | {"world_size": world_size}
    for way in DIRECTIONS:
        values |= {way: layout.name, f"{way}_parameters": asdict(layout)}
    return values


def _training_of(layout: Layout, context: int, data: int, dice: random.Random) -> Values:
    """Return a configuration of a training run with one layout that writes all a run can: a trace imports pandas."""
    split = {"world_size": context * data, "context": context, "data": data}
    writes = {"asynchronous": True, "trace_out": True, "metrics": True}
    return draw_training(dice) | split | writes | {"layout": layout.name, "layout_parameters": asdict(layout)}


@cache
def communicators_of(layout: Layout, world_size: int) -> frozenset[Communicator]:
    """Return all that a layout opens among so many ranks; none where it does not apply to them."""
    try:
        plan = attention_case(_plain(layout, world_size, random.Random(0))).plan
    except (InputError, UnsupportedError, ScheduleError):
        return frozenset()
    return frozenset(one for way in DIRECTIONS for one in plan.schedule(way).communicators)


def draw_training(dice: random.Random) -> Values:
    """Return a configuration of a small training run, which is stopped and resumed."""
    selector = dice.choice(sorted(SELECTORS))
    context, data = dice.choice(SPLITS)
    layout = _draw_layout(dice, context)
    steps = dice.randint(2, 4)
    return {
        "kind": "training",
        "seed": dice.randrange(1 << 31),
        "world_size": context * data,
        "context": context,
        "data": data,
        "selector": selector,
        "settings": {name: dice.choice(choices) for name, choices in SELECTORS[selector].items()},
        "layout": layout.name,
        "layout_parameters": asdict(layout),
        "seq_len_tokens": dice.randint(130, 700),
        "block_size": dice.choice((64, 128)),
        "dtype": dice.choice(("float32", "float32", "float64", "bfloat16")),
        "microbatches": dice.choice((1, 1, 2)),
        "documents": {name: dice.random() < 0.3 for name in ("loss", "positions")},
        "checkpoint_layers": dice.random() < 0.5,
        "asynchronous": dice.random() < 0.7,
        "poison": dice.random() < 0.3,
        "trace_out": dice.random() < 0.3,
        "metrics": dice.random() < 0.5,
        "steps": steps,
        "stop_before": dice.randint(1, steps - 1),
    }


def _draw_layout(dice: random.Random, world_size: int) -> Layout:
    """Return any value of any registered layout, each layout as often; it may not apply to the sizes."""
    kind = dice.choice(known_layouts())
    return dice.choice([one for one in _every_layout(world_size) if type(one) is kind])


def _every_layout(world_size: int) -> list[Layout]:
    """Return every registered layout with every small value of its parameters."""
    found: list[Layout] = []
    for kind in known_layouts():
        counts = sorted({1, 2, 3, world_size})
        choices = [(False, True) if field.type in (bool, "bool") else counts for field in fields(kind)]
        names = [field.name for field in fields(kind)]
        found += [kind(**dict(zip(names, values, strict=True))) for values in product(*choices)]
    return found


def _pattern(values: Values) -> LayerPattern:
    tokens, block_size = values["seq_len_tokens"], values["block_size"]
    settings = SyntheticSettings(
        seq_len_tokens=tokens, heads=values["heads"], block_size=block_size, density=values["density"],
        columns=values["columns"], window_tokens=3 * block_size, chunk_tokens=2 * block_size,
        mean_document_tokens=max(1, tokens // 3),
    )  # fmt: skip
    pattern = synthesize(values["mask"], settings, seed=values["seed"])
    if not values["documents"] or pattern.documents is not None:
        return pattern
    cuts = np.sort(np.random.default_rng(values["seed"]).integers(0, tokens, values["documents"] - 1))
    ids = np.searchsorted(cuts, np.arange(tokens), side="right").astype(np.int32)
    return replace(pattern, documents=ids)


def _order(values: Values) -> tuple[int, ...]:
    """Return the query heads in a random order of whole groups, those of one K/V head."""
    size = values["heads"] // values["kv_heads"]
    groups = random.Random(values["seed"]).sample(range(values["kv_heads"]), values["kv_heads"])
    return tuple(group * size + head for group in groups for head in range(size))


def _placement(values: Values, pattern: LayerPattern) -> Placement:
    common = {name: values[name] for name in ("seq_len_tokens", "world_size", "granularity_tokens")}
    if values["placement"] != "balanced":
        return REGULAR_PLACEMENTS[values["placement"]](**common)
    padded = REGULAR_PLACEMENTS["striped"](**common).padded_tokens
    load = unit_load([pattern], granularity_tokens=values["granularity_tokens"], padded_tokens=padded)
    return balanced(unit_load=load, **common)


def playable_attention(dice: random.Random, refused: dict[str, int]) -> Values:
    """Draw configurations until one has a plan; refused: how often each reason was given, counted on."""
    while True:
        values = draw_attention(dice)
        try:
            attention_case(values)
        except (InputError, UnsupportedError, ScheduleError) as error:
            reason = "".join("N" if letter.isdigit() else letter for letter in str(error))[:160]
            refused[reason] = refused.get(reason, 0) + 1
            continue
        return values
