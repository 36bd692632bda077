"""Layouts as values: made by name, parsed, written, and refused in one line."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest

from layout_cases import layout_shape, layouts_for
from sparsering.planner.layouts.gather import Gather
from sparsering.planner.layouts.layout import Layout
from sparsering.planner.layouts.registry import layout_names, make_layout, parse_layout, register
from sparsering.planner.layouts.ring import Ring
from sparsering.planner.layouts.ulysses import Ulysses
from sparsering.planner.plan import LayoutSpec
from sparsering.planner.schedule.shape import AttentionShape
from sparsering.traces.errors import InputError, UnsupportedError


def test_shipped_layouts_are_known_the_plainest_first() -> None:
    shipped = ("gather", "ring", "hierarchical", "two_level", "collective", "ulysses")
    assert tuple(name for name in layout_names() if name in shipped) == shipped


@pytest.mark.parametrize("layout", layouts_for(layout_shape(4)), ids=str)
def test_text_and_files_give_the_layout_back(layout: Layout) -> None:
    assert parse_layout(layout.text) == layout
    spec = LayoutSpec.model_validate_json(LayoutSpec.of(layout).model_dump_json())
    assert spec.value == layout == make_layout(layout.name, layout.parameters)


def test_words() -> None:
    assert str(Ring(prefetch=2)) == "ring (prefetch 2)"
    assert str(Gather(keep_kv=True, pull=True)) == "gather (chunks 1, keep_kv, pull)"
    assert Gather(chunks=2, pull=True).text == "gather:chunks=2,pull"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("star", "layout: 'star' is not one of gather, ring"),
        ("ring:chunks=2", "chunks: is no parameter of 'ring': it has prefetch"),
        ("hierarchical", "inner_size: is missing for 'hierarchical'"),
        ("ring:prefetch=0", "prefetch: must be at least 1, not 0"),
        ("ring:prefetch=two", "prefetch: 'two' is not a whole number"),
        ("ring:prefetch", "prefetch: is True, not a whole number"),
        ("gather:pull=2", "pull: is 2, not true or false"),
        ("collective:chunks=2", "chunks: is no parameter of 'collective': it has none"),
    ],
)
def test_what_is_no_layout_is_refused(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_layout(text)


@pytest.mark.parametrize("value", [1.0, "1", None, True])
def test_counts_are_whole_numbers(value: Any) -> None:
    with pytest.raises(InputError, match=r"prefetch: is .*, not a whole number"):
        make_layout("ring", {"prefetch": value})


def test_what_does_not_apply_is_refused_when_it_is_built() -> None:
    with pytest.raises(UnsupportedError, match="hierarchical: 4 ranks are no groups of 3"):
        make_layout("hierarchical", {"inner_size": 3}).build(shape=layout_shape(4), direction="forward")
    with pytest.raises(UnsupportedError, match="ulysses: 4 ranks are no groups of 3"):
        Ulysses(degree=3).build(shape=layout_shape(4), direction="forward")
    with pytest.raises(UnsupportedError, match=r"6 heads \(2 K/V heads\) cannot be split evenly over 3 ranks"):
        Ulysses(degree=3).build(shape=layout_shape(3), direction="forward")
    with pytest.raises(InputError, match="kv_heads: 4 heads are not a multiple of 3 KV heads"):
        AttentionShape(world_size=1, tokens_per_rank=1, heads=4, kv_heads=3, head_dim=1)


def test_a_name_belongs_to_one_layout() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Other(Ring):
        name: ClassVar[str] = "ring"

    with pytest.raises(ValueError, match="'ring' is the name of two layouts, Ring and"):
        register(Other)
    assert make_layout("ring") == Ring()


def test_the_hash_names_the_expanded_schedule() -> None:
    one, same, other = (
        Ring(prefetch=prefetch).build(shape=layout_shape(4), direction="forward") for prefetch in (1, 1, 2)
    )
    assert one.sha256() == same.sha256() != other.sha256()
