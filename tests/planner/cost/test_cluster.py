"""Cluster files: presets, and one clear line for everything that cannot be used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

import tiny
from sparsering.planner.cost.cluster import load_cluster, parse_cluster, preset_names
from sparsering.planner.cost.kernels import datasheet_cost
from sparsering.planner.cost.timing import Port, capacity_bytes_per_us, link_of, route
from sparsering.planner.plan import ModelShape
from sparsering.planner.schedule.launches import Launch
from sparsering.planner.schedule.schedule import Direction, ShardId, Task
from sparsering.planner.schedule.workload import TaskWork
from sparsering.traces.errors import InputError


def test_presets_are_the_users_clusters() -> None:
    sizes = {name: (load_cluster(name).nodes, load_cluster(name).gpus_per_node) for name in preset_names()}
    expected = {"a100-nvlink-8": (1, 8), "a100-hdr-4x8": (4, 8), "h200-nvlink-8": (1, 8), "local-cpu-4": (1, 4)}
    assert sizes == expected | {"h100-nvlink-8": (1, 8), "h100-ndr-4x8": (4, 8), "h200-nvlink-4": (1, 4)}
    assert {name for name in sizes if load_cluster(name).pulls} == {"h100-nvlink-8", "h200-nvlink-8", "h200-nvlink-4"}
    for name in preset_names():
        cluster = load_cluster(name)
        assert cluster.name == name
        assert cluster.origin == ("measured" if name == "h200-nvlink-4" else "datasheet")
        assert (cluster.calibration is not None) == (cluster.origin == "measured")
        assert cluster.notes
        has_gpus = cluster.gpu.multiprocessors > 1
        assert (cluster.gpu.memory_bandwidth_bytes_per_us is not None) == has_gpus


def test_memory_bandwidth_may_be_left_out_but_not_be_nothing() -> None:
    gpu = tiny.cluster().gpu.model_dump(mode="json")
    del gpu["memory_bandwidth_bytes_per_us"]
    assert parse_cluster(document(gpu=gpu), source="here").gpu.memory_bandwidth_bytes_per_us is None
    with pytest.raises(InputError, match=r"gpu\.memory_bandwidth_bytes_per_us: Input should be greater than 0, not 0"):
        parse_cluster(document(gpu=gpu | {"memory_bandwidth_bytes_per_us": 0}), source="here")


def document(**changes: Any) -> dict[str, Any]:
    return tiny.cluster().model_dump(mode="json") | changes


def test_a_file_says_the_same_as_what_it_was_written_from(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(document(name="mine")))
    assert load_cluster(path) == parse_cluster(document(name="mine"), source="here")


NODE_LINK = {"name": "port", "bandwidth_bytes_per_us": 1.0, "latency_us": 1.0}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"intra_node": NODE_LINK | {"switch_bandwidth_bytes_per_us": 1.0, "pull_bandwidth_bytes_per_us": 1.0}},
            "c.yaml: intra_node: a switch's capacity beside pulls is not modelled: give one of the two",
        ),
        ({"nodes": 0}, "c.yaml: nodes: Input should be greater than 0, not 0"),
        ({"gpus": 8}, "c.yaml: gpus: unknown key (its value is 8); did you mean 'gpu'?"),
        ({"schema_version": 2}, "c.yaml: schema_version: is 2; this version reads up to 1"),
        ({"origin": "rumour"}, "c.yaml: origin: must be 'measured' or 'datasheet', not 'rumour'"),
        ({"inter_node": None, "nodes": 2}, "c.yaml: inter_node: is needed for more than one node"),
        (
            {"intra_node": {"name": "x", "bandwidth_bytes_per_us": float("inf"), "latency_us": 1}},
            "c.yaml: intra_node.bandwidth_bytes_per_us: Input should be a finite number, not inf",
        ),
    ],
)
def test_impossible_values_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_cluster(document(**changes), source="c.yaml")
    assert str(caught.value) == message


def test_of_several_mistakes_the_most_telling_is_said() -> None:
    """A misspelt key is unknown where it stands and missing where it was meant: what was written is what to mend."""
    gpu = tiny.cluster().gpu.model_dump(mode="json")
    misspelt = {name.replace("multiprocessors", "multiprocesors"): value for name, value in gpu.items()}
    wrong = document(gpu=misspelt, nodes=0)
    del wrong["name"]
    mended = wrong | {"gpu": gpu}
    said = {}
    for what, broken in (("misspelt", wrong), ("value", mended), ("missing", mended | {"nodes": 1})):
        with pytest.raises(InputError) as caught:
            parse_cluster(broken, source="c.yaml")
        said[what] = str(caught.value)
    assert said == {
        "misspelt": "c.yaml: gpu.multiprocesors: unknown key (its value is 4); did you mean 'multiprocessors'?",
        "value": "c.yaml: nodes: Input should be greater than 0, not 0",
        "missing": "c.yaml: name: is missing",
    }


def test_an_unknown_name_lists_the_presets() -> None:
    with pytest.raises(InputError, match=r"h900: no such file or preset; presets are a100-hdr-4x8, a100-nvlink-8, "):
        load_cluster("h900")


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe\x00", b"- a\n"])
def test_a_broken_file_is_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "broken.yaml"
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        load_cluster(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_routes_go_through_ports_within_a_node_and_cards_between() -> None:
    cluster = tiny.cluster(nodes=2, gpus=4, nics=2, nic_bandwidth=300.0)
    assert route(cluster, 1, 2) == (Port("gpu-out", 0, 1), Port("gpu-in", 0, 2))
    assert route(cluster, 1, 6) == (Port("nic-out", 0, 0), Port("nic-in", 1, 1))
    assert capacity_bytes_per_us(cluster, Port("nic-out", 0, 0)) == 300.0
    assert link_of(cluster, 1, 6) is cluster.inter_node
    assert route(tiny.cluster(switch=10.0), 0, 1)[-1] == Port("gpu-switch", 0)
    assert [cluster.nic_of(rank) for rank in range(8)] == [0, 0, 1, 1, 0, 0, 1, 1]


def test_kernels_of_a_backend_may_have_efficiencies_of_their_own() -> None:
    quick = {"block_forward_efficiency": 0.9, "block_backward_efficiency": 0.8, "column_efficiency": 0.3}
    gpu = tiny.cluster().gpu.model_dump(mode="json") | {"backends": {"flash4": quick}}
    cluster = parse_cluster(document(gpu=gpu), source="here")
    model = ModelShape(layers=1, heads=4, kv_heads=2, head_dim=64)
    own = ShardId(sequence_part=0)
    block = Task(query=own, key=own, heads=(0, 4), key_buffer="")
    columns = Task(query=own, key=None, heads=(0, 4), key_buffer="", kind="columns")
    work = TaskWork(tile_pairs=1000, rows_with_work=100, longest_row=10, key_rows_with_work=100, longest_key_row=10,
                    rows=100)  # fmt: skip
    costs = {name: datasheet_cost(cluster.gpu, model, block_size=64, backend=name) for name in ("triton", "flash4")}

    def us(backend: str, task: Task, direction: Direction) -> float:
        launches = 2 if direction == "backward" else 1
        overhead_us = launches * cluster.gpu.launch_overhead_us
        return costs[backend].launch_us(Launch(tasks=(task,)), [work], direction) - overhead_us

    assert us("triton", block, "forward") == pytest.approx(us("flash4", block, "forward") * 0.9 / 0.5)
    assert us("triton", block, "backward") == pytest.approx(us("flash4", block, "backward") * 0.8 / 0.5)
    assert us("triton", columns, "forward") == pytest.approx(us("flash4", columns, "forward") * 0.9 * 0.3 / 0.25)
    with pytest.raises(InputError, match=r"backends\.abacus"):
        parse_cluster(document(gpu=gpu | {"backends": {"abacus": quick}}), source="here")
