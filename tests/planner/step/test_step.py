"""A step's parts, worked out by hand with round numbers: one layer of one head, one parameter a matrix."""

from __future__ import annotations

import pytest

import tiny
from sparsering.planner.cost.cluster import Cluster, parse_cluster
from sparsering.planner.specs import ModelShape
from sparsering.planner.step.parts import AttentionTimes, StepEstimate, estimate_step, shard_link_bytes_per_us
from sparsering.planner.step.work import StepSettings, TransformerSizes, layer_bytes, layer_runs
from sparsering.traces.errors import UnsupportedError

SIZES = TransformerSizes(
    attention=ModelShape(layers=4, heads=2, kv_heads=1, head_dim=8), hidden=16, mlp_hidden=32, vocabulary=100,
    parameters=10_000, layer_parameters=2_000,
)  # fmt: skip
PLAIN = {"tokens": 10, "microbatches": 1, "ranks": 1, "whole_layers": 4, "fused_layers": True, "fused_loss": True,
         "element_bytes": 2, "master_bytes": 4}  # fmt: skip
NOTHING = AttentionTimes(forward_us=0.0, backward_us=0.0)


def settings(**changes: int | bool) -> StepSettings:
    return StepSettings(**(PLAIN | changes))  # pyright: ignore[reportArgumentType]


def cluster(gpus: int = 2, **gpu: float) -> Cluster:
    """Rates of 1 million FLOPs and 1,000 bytes a microsecond, and whole shares of both unless said."""
    made = tiny.cluster(gpus=gpus, bandwidth=50.0)
    rates = {"memory_bandwidth_bytes_per_us": 1000.0, "matmul_efficiency": 1.0, "streaming_efficiency": 1.0}
    return made.model_copy(update={"gpu": made.gpu.model_copy(update=rates | gpu)})


def parts(estimate: StepEstimate) -> dict[str, float]:
    return {part.name: part.us for part in estimate.parts}


def test_every_part_by_hand() -> None:
    found = estimate_step(SIZES, settings(), cluster(), NOTHING, tokens=10)
    # 2 FLOPs a parameter and token forward, 4 backward, 4 layers: 2000 * 10 * 6 * 4.
    assert parts(found)["matrices of the layers"] == pytest.approx(0.48)
    # A token of one forward run: norms 2 * 4 and sums 12 bytes times 16, rotation 4 bytes times 24, activation 6 times
    # 32: 320 + 96 + 192; forward once and backward twice, 4 layers, 10 tokens.
    assert layer_bytes(SIZES, settings()) == 608 * 3 * 4 * 10
    assert parts(found)["norms, activations, sums"] == pytest.approx(72.96)
    # Logits and two gradients of 100 * 16 parameters, three passes over 100 logits of 2 bytes.
    assert parts(found)["loss"] == pytest.approx(3 * 2 * 1600 * 10 / 1e6 + 100 * 10 * 6 / 1000)
    assert parts(found)["optimizer"] == pytest.approx(10 * 4 * 10_000 / 1000)
    assert "sharded parameters, waited for" not in parts(found), "one rank holds all"
    assert found.us == pytest.approx(sum(parts(found).values()))
    assert found.tokens_per_s == pytest.approx(10 / found.us * 1e6)
    assert found.gpu_hours(steps=3600, ranks=1_000_000) == pytest.approx(found.us)


def test_layers_that_are_computed_again_cost_a_forward_more() -> None:
    assert [layer_runs(SIZES, settings(whole_layers=whole)) for whole in (0, 1, 4, 9)] == [8, 7, 4, 4]
    again = estimate_step(SIZES, settings(whole_layers=0), cluster(), NOTHING, tokens=10)
    assert parts(again)["matrices of the layers"] == pytest.approx(0.48 * 4 / 3)


def test_attention_and_microbatches_count_as_often_as_they_run() -> None:
    attention = AttentionTimes(forward_us=3.0, backward_us=7.0, choosing_us=1.0)
    once = estimate_step(SIZES, settings(), cluster(), attention, tokens=10)
    twice = estimate_step(SIZES, settings(microbatches=2), cluster(), attention, tokens=20)
    assert [parts(twice)[name] for name in ("attention, forward", "attention, backward", "choosing patterns")] == [
        6,
        14,
        2,
    ]
    for name, us in parts(once).items():
        assert parts(twice)[name] == pytest.approx(us if name == "optimizer" else 2 * us)


def test_shards_hide_behind_layers_that_take_longer() -> None:
    """Two ranks: 2000 parameters of a layer are 2000 bytes to gather, twice, and 4000 to scatter: 160 us at 50."""
    root = 10_000 - 4 * 2_000
    first_us = (2 * 2 * (2_000 + root) / 2 + 4 * root / 2) / 50
    hidden = AttentionTimes(forward_us=4 * 100.0, backward_us=4 * 100.0)
    long = estimate_step(SIZES, settings(ranks=2), cluster(), hidden, tokens=20)
    assert parts(long)["sharded parameters, waited for"] == pytest.approx(first_us)
    short = estimate_step(SIZES, settings(ranks=2), cluster(), NOTHING, tokens=20)
    a_layer_us = (parts(short)["matrices of the layers"] + parts(short)["norms, activations, sums"]) / 4
    waited = first_us + 4 * (160 - a_layer_us)
    assert parts(short)["sharded parameters, waited for"] == pytest.approx(waited)


def test_shares_of_rates_count() -> None:
    half = cluster(matmul_efficiency=0.5, streaming_efficiency=0.25)
    found = parts(estimate_step(SIZES, settings(), half, NOTHING, tokens=10))
    assert found["matrices of the layers"] == pytest.approx(0.96)
    assert found["optimizer"] == pytest.approx(4 * 400)


def test_the_slowest_link_on_the_way_carries_shards() -> None:
    document = tiny.cluster(gpus=4, bandwidth=50.0).model_dump(exclude_none=True)
    nics = {"name": "nics", "bandwidth_bytes_per_us": 10.0, "latency_us": 1.0, "nics_per_node": 2}
    two = parse_cluster(document | {"nodes": 2, "gpus_per_node": 2, "inter_node": nics}, source="two.yaml")
    assert shard_link_bytes_per_us(two, 2) == 50.0, "within a node"
    assert shard_link_bytes_per_us(two, 4) == 20.0, "a ring through each of two cards"
    switched = nics | {"switch_bandwidth_bytes_per_us": 30.0}
    capped = parse_cluster(document | {"nodes": 2, "gpus_per_node": 2, "inter_node": switched}, source="two.yaml")
    assert shard_link_bytes_per_us(capped, 4) == 15.0, "both nodes share the switch"


def test_a_cluster_without_a_memory_bandwidth_has_no_steps() -> None:
    with pytest.raises(UnsupportedError, match=r"gpu\.memory_bandwidth_bytes_per_us: is needed for a whole step"):
        estimate_step(SIZES, settings(), tiny.cluster(gpus=2), NOTHING, tokens=10)
