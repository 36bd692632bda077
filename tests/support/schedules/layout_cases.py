"""Every registered layout with every small value of its parameters: property tests know none of them by name."""

from __future__ import annotations

from dataclasses import fields
from itertools import product

from hypothesis import strategies as st

from sparsering.planner.layouts.layout import Layout
from sparsering.planner.layouts.registry import known_layouts
from sparsering.planner.schedule.shape import AttentionShape


def layout_shape(world_size: int, columns: int = 0, *, tokens_per_rank: int = 64) -> AttentionShape:
    """Two K/V heads, two query heads a rank."""
    return AttentionShape(
        world_size=world_size,
        tokens_per_rank=tokens_per_rank,
        heads=2 * world_size,
        kv_heads=2,
        head_dim=16,
        columns_capacity=columns,
    )


def layouts_for(shape: AttentionShape, counts: tuple[int, ...] = ()) -> list[Layout]:
    """Return what applies to a shape of all registered layouts, counts being those given, or 1, 2, 3 and the ranks."""
    counts = counts or tuple(sorted({1, 2, 3, shape.world_size}))
    found: list[Layout] = []
    for layout in known_layouts():
        flags = [(False, True) if field.type in (bool, "bool") else counts for field in fields(layout)]
        for values in product(*flags):
            one = layout(**dict(zip((field.name for field in fields(layout)), values, strict=True)))
            if one.why_not(shape) is None:
                found.append(one)
    return found


def layout_values(shape: AttentionShape, *, leaves_out: bool = False) -> st.SearchStrategy[Layout]:
    """Draw a layout by name first, so that those with few parameters are drawn as often.

    leaves_out: only of those that neither compute nor send pairs without work.
    """
    by_name: dict[str, list[Layout]] = {}
    for one in (one for one in layouts_for(shape) if one.leaves_out or not leaves_out):
        by_name.setdefault(one.name, []).append(one)
    return st.sampled_from(sorted(by_name)).flatmap(lambda name: st.sampled_from(by_name[name]))
