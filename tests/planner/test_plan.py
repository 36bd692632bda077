"""The plan file: what goes in comes out, and nothing that was altered is believed."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsering.planner.layouts.gather import Gather
from sparsering.planner.layouts.hierarchical import Hierarchical
from sparsering.planner.layouts.ring import Ring
from sparsering.planner.plan import AttentionSpec, KernelSpec, ModelShape, PatternSpec, Plan, load_plan, make_plan
from sparsering.planner.schedule.placement import balanced, contiguous, striped, zigzag
from sparsering.traces.errors import InputError
from sparsering.traces.files import canonical_json, sha256_of_bytes

MODEL = ModelShape(layers=2, heads=4, kv_heads=2, head_dim=64)


def small_plan(**changes: Any) -> Plan:
    spec = {"model": MODEL, "seq_len_tokens": 500, "block_size": 64, "dtype": "bfloat16", "columns_capacity": 64}
    attention = spec | {name: changes.pop(name) for name in spec if name in changes}
    record = {
        "predictions": {"step_time_us": 12.345, "candidates": [{"layout": "ring", "fits_memory": True}], "note": "a×b"},
        "provenance": {"date": "2026-01-02T03:04:05+00:00", "seed": 0},
    }
    record |= {name: changes.pop(name) for name in record if name in changes}
    arguments: dict[str, Any] = {
        "attention": AttentionSpec.model_validate(attention),
        "placement": striped(seq_len_tokens=500, world_size=2, granularity_tokens=64),
        "forward": Gather(chunks=1),
        "backward": Ring(prefetch=1),
        "pattern": PatternSpec(source="trace", trace_sha256="a" * 64),
        "kernels": KernelSpec(backend="triton"),
    }
    return make_plan(**arguments | changes).with_record(**record)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "plan.json"
    small_plan().save(path)
    return path


def rewrite(path: Path, *, reseal: bool = True, **changes: Any) -> Path:
    """Change fields (dots go deeper) and compute the digest anew, so that only the change itself can be refused."""
    document = json.loads(path.read_text())
    for name, value in changes.items():
        *outer, last = name.split("__")
        place = document
        for part in outer:
            place = place[part]
        place[last] = value
    if reseal:
        body = {k: v for k, v in document.items() if k not in ("digest", "predictions", "provenance", "record_sha256")}
        document["digest"] = sha256_of_bytes(canonical_json(body))
    path.write_text(json.dumps(document))
    return path


def refusal(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        load_plan(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    return str(caught.value)


@given(data=st.data())
def test_a_plan_comes_back_as_it_was(data, tmp_path_factory: pytest.TempPathFactory):
    world, blocks = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 20))
    seq_len_tokens = blocks * 64 - data.draw(st.integers(0, 63))
    sizes = {"seq_len_tokens": seq_len_tokens, "world_size": world, "granularity_tokens": 64}
    load = [data.draw(st.integers(0, 9)) for _ in range(blocks)]
    made = [contiguous(**sizes), zigzag(**sizes), striped(**sizes)]
    made.append(balanced(**sizes, unit_load=np.array(load)))
    layouts = [Ring(prefetch=2), Gather(chunks=2), Hierarchical(inner_size=world)]
    plan = small_plan(
        seq_len_tokens=seq_len_tokens,
        placement=data.draw(st.sampled_from(made)),
        forward=data.draw(st.sampled_from(layouts)),
        backward=data.draw(st.sampled_from(layouts)),
        columns_capacity=data.draw(st.sampled_from([0, 64])),
        dtype=data.draw(st.sampled_from(["bfloat16", "float64"])),
    )
    path = tmp_path_factory.mktemp("plans") / "plan.json"
    plan.save(path)
    again = load_plan(path)
    assert again == plan
    assert again.compute_digest() == plan.digest
    for direction in ("forward", "backward"):
        spec = plan.forward if direction == "forward" else plan.backward
        expected = spec.value.build(shape=plan.attention_shape(), direction=direction)
        assert again.schedule(direction).sha256() == expected.sha256() == spec.schedule_sha256


def test_no_flipped_bit_is_believed(saved: Path):
    data, plan, draw = saved.read_bytes(), load_plan(saved), random.Random(0)
    refused = 0
    for place in range(len(data)):
        altered = bytearray(data)
        altered[place] ^= 1 << draw.randrange(8)
        saved.write_bytes(bytes(altered))
        try:
            assert load_plan(saved) == plan, f"byte {place}: {data[place : place + 1]!r} -> {altered[place]!r}"
        except InputError as error:
            assert "\n" not in str(error)
            refused += 1
    assert refused > 0.8 * len(data)  # the rest is white space between values


@given(kept=st.floats(0, 0.999))
def test_no_truncated_file_is_believed(kept: float, tmp_path_factory: pytest.TempPathFactory):
    path = tmp_path_factory.mktemp("plans") / "plan.json"
    small_plan().save(path)
    data = path.read_bytes().rstrip()
    path.write_bytes(data[: int(kept * len(data))])
    assert "not valid JSON" in refusal(path)


def test_digest_covers_what_ranks_do_and_nothing_else():
    plan = small_plan()
    assert small_plan(predictions={}, provenance={"seed": 7}).digest == plan.digest
    others = [
        small_plan(dtype="float16"),
        small_plan(columns_capacity=0),
        small_plan(forward=Ring(prefetch=1)),
        small_plan(placement=contiguous(seq_len_tokens=500, world_size=2, granularity_tokens=64)),
        small_plan(kernels=KernelSpec(backend="blockwise")),
        small_plan(pattern=PatternSpec(source="trace", trace_sha256="b" * 64)),
    ]
    assert len({plan.digest, *(other.digest for other in others)}) == len(others) + 1


def test_newer_schema_is_refused(saved: Path):
    message = refusal(rewrite(saved, schema_version=2))
    assert "schema_version: is 2; this version reads up to 1" in message


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"seq_len_tokens": 0}, "seq_len_tokens"),
        ({"seq_len_tokens": 10**6}, "do not cover 1000000 tokens"),
        ({"model__kv_heads": 3}, "kv_heads"),
        ({"model__heads": "four"}, "model.heads"),
        ({"dtype": "int8"}, "dtype"),
        ({"columns_capacity": 4096}, "columns_capacity"),
        ({"placement__units": [0, 0, 1, 2, 3, 4, 5, 6]}, "every unit must be owned by exactly one rank"),
        ({"placement__units": [0, 1, 2, 3, 4, 5, 6]}, "7 units over 2 ranks"),
        ({"placement__world_size": 3}, "8 units over 3 ranks"),
        ({"forward__layout": "spiral"}, "'spiral'"),
        ({"forward__parameters": {"chunks": 0}}, "chunks"),
        ({"backward__parameters": {"depth": 1}}, "backward: depth: is no parameter of 'ring'"),
        ({"backward__schedule_sha256": "xyz"}, "backward.schedule_sha256"),
        ({"kernels__backend": "abacus"}, "kernels.backend"),
        ({"kernels__tile": 64}, "kernels.tile"),
        ({"colour": "red"}, "colour"),
        ({"predictions": {"step_time_us": 1.0}}, "record_sha256"),
    ],
)
def test_impossible_values_are_refused_by_name(saved: Path, changes: dict[str, Any], named: str):
    assert named in refusal(rewrite(saved, **changes))


def test_a_changed_value_without_a_new_digest_is_refused(saved: Path):
    assert "digest" in refusal(rewrite(saved, reseal=False, dtype="float16"))


@pytest.mark.parametrize("content", ["[]", "3", "null", '{"schema_version": NaN}', "{", ""])
def test_what_is_no_plan_is_refused(tmp_path: Path, content: str):
    path = tmp_path / "plan.json"
    path.write_text(content)
    refusal(path)


def test_a_schedule_that_is_not_the_planned_one_is_refused(saved: Path):
    plan = load_plan(rewrite(saved, forward__schedule_sha256="0" * 64))
    with pytest.raises(InputError, match="no longer expands"):
        plan.schedule("forward")
    assert plan.schedule("backward").world_size == 2


def test_a_run_it_was_not_made_for_is_refused():
    plan = small_plan()
    plan.require(world_size=2, model=MODEL, seq_len_tokens=500, dtype="bfloat16")
    with pytest.raises(InputError, match="world_size: the plan is for 2, not for 4"):
        plan.require(world_size=4)
    with pytest.raises(InputError, match="seq_len_tokens: the plan is for 500, not for 512"):
        plan.require(seq_len_tokens=512)
    with pytest.raises(InputError, match="dtype: the plan is for bfloat16, not for float16"):
        plan.require(dtype="float16")
    with pytest.raises(InputError, match="model"):
        plan.require(model=MODEL.model_copy(update={"heads": 8}))
