"""`sparsering cluster`: a cluster file of texts and a base, what it says of its sources, what commands warn of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner, Result

import tiny
from sparsering import cli
from sparsering.planner.cost.cluster import load_cluster, parse_cluster
from tool_texts import MIB, nccl_table, topology

CARDS = tuple(f"NIC{number}" for number in range(4))


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, [*map(str, arguments)])


def imported(folder: Path, *arguments: object, base: str = "h100-nvlink-8", **texts: str) -> Result:
    """Import the texts given: topo, and tables whose names begin with anything else."""
    given: list[object] = []
    for name, text in texts.items():
        (folder / f"{name}.txt").write_text(text)
        given += ["--topology" if name == "topo" else "--nccl-tests", folder / f"{name}.txt"]
    return invoke("cluster", *given, "--base", base, "-o", folder / "mine.yaml", *arguments)


def refusal(result: Result) -> str:
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (2, "", 1), result.output
    return result.stderr.removeprefix("sparsering: ").strip()


def test_a_node_measured_through_its_switch(tmp_path: Path) -> None:
    table = nccl_table(hosts=("node1",) * 4, latency_us=17.0, bytes_per_us=222e3)
    result = imported(tmp_path, topo=topology(4, cards=CARDS), table=table)
    assert result.exit_code == 0, result.output
    base, made = load_cluster("h100-nvlink-8"), load_cluster(tmp_path / "mine.yaml")
    assert (made.name, made.origin, made.nodes, made.gpus_per_node) == ("mine", "datasheet", 1, 4)
    assert made.gpu == base.gpu
    assert made.intra_node.bandwidth_bytes_per_us == pytest.approx(222e3, rel=0.01)
    assert made.intra_node.latency_us == pytest.approx(17.0, rel=0.01)
    assert made.intra_node.pull_bandwidth_bytes_per_us == base.intra_node.pull_bandwidth_bytes_per_us
    assert "Links measured (intra_node by sendrecv_perf, nccl-tests); the rest of h100-nvlink-8" in made.notes
    lines = result.stdout.splitlines()
    beginnings = (
        "GPUs of a node (4), cards (4): of the topology",
        "intra_node: 222 GB/s a port, 17",
        "intra_node.pull_bandwidth_bytes_per_us (363000): of h100-nvlink-8, not measured",
        "cards have no use: neither h100-nvlink-8 nor a table says what they carry",
        "the GPU (NVIDIA H100 SXM5 80GB, its kernels, its slowdowns): of h100-nvlink-8, not measured; the tests ran on",
        "nodes (1): of h100-nvlink-8",
        f"wrote {tmp_path / 'mine.yaml'} (datasheet)",
    )
    assert len(lines) == len(beginnings)
    assert [line for line, beginning in zip(lines, beginnings, strict=True) if not line.startswith(beginning)] == []


def test_links_between_nodes_are_measured_by_one_rank_a_host(tmp_path: Path) -> None:
    within = nccl_table(test="alltoall_perf", share=7 / 8, bytes_per_us=230e3)
    between = nccl_table(hosts=("node1", "node2"), latency_us=40.0, bytes_per_us=44e3)
    result = imported(tmp_path, "--nodes", 3, "--json", topo=topology(cards=CARDS), within=within, between=between)
    assert result.exit_code == 0, result.output
    made = load_cluster(tmp_path / "mine.yaml")
    assert (made.nodes, made.world_size) == (3, 24)
    assert made.inter_node is not None
    assert made.inter_node.nics_per_node == 4
    assert made.inter_node.bandwidth_bytes_per_us == pytest.approx(44e3, rel=0.01)
    assert made.inter_node.latency_us == pytest.approx(40.0, rel=0.01)
    assert made.intra_node.bandwidth_bytes_per_us == pytest.approx(230e3, rel=0.01)
    told = json.loads(result.stdout)
    assert told["origin"] == "datasheet"
    assert not any(line.startswith("nodes (") for line in told["lines"])


def test_a_topology_alone_counts(tmp_path: Path) -> None:
    result = imported(tmp_path, base="h100-ndr-4x8", topo=topology(cards=CARDS))
    base, made = load_cluster("h100-ndr-4x8"), load_cluster(tmp_path / "mine.yaml")
    assert made.inter_node is not None and base.inter_node is not None
    assert made.inter_node == base.inter_node.model_copy(update={"nics_per_node": 4})
    assert made.intra_node.bandwidth_bytes_per_us == base.intra_node.bandwidth_bytes_per_us
    assert "inter_node (but for the number of cards): of h100-ndr-4x8" in result.stdout
    assert "GPU4, GPU5, GPU6, GPU7 have no card near" in result.stdout
    assert made.notes.startswith("No link measured; the rest of h100-ndr-4x8.")


def test_tables_alone_leave_the_node_as_it_is(tmp_path: Path) -> None:
    table = nccl_table(sizes=(64 * MIB, 128 * MIB, 256 * MIB))
    result = imported(tmp_path, base="a100-hdr-4x8", table=table)
    base, made = load_cluster("a100-hdr-4x8"), load_cluster(tmp_path / "mine.yaml")
    assert (made.gpus_per_node, made.inter_node) == (8, base.inter_node)
    assert made.intra_node.latency_us == base.intra_node.latency_us
    assert "latency 12 µs not measured, the sizes are too large" in result.stdout
    assert "GPUs of a node (8): of a100-hdr-4x8" in result.stdout


def test_wires_and_parts_of_a_node_are_told(tmp_path: Path) -> None:
    table = nccl_table(hosts=("node1",) * 2)
    result = imported(tmp_path, topo=topology(4, link=lambda a, b: "NV4"), table=table)
    assert "NV4 between 4 GPUs may be wires of each pair" in result.stdout
    assert "intra_node was measured with 2 of 4 GPUs" in result.stdout


def test_a_measured_base_stays_measured(tmp_path: Path) -> None:
    document = tiny.cluster().model_dump(mode="json") | {"origin": "measured"}
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(document))
    assert imported(tmp_path, base=str(tmp_path / "base.yaml"), table=nccl_table()).exit_code == 0
    assert load_cluster(tmp_path / "mine.yaml").origin == "measured"


@pytest.mark.parametrize(
    ("texts", "problem"),
    [
        ({}, "give --topology, --nccl-tests or both"),
        ({"topo": topology(4, link=lambda a, b: "SYS")}, "topo.txt: GPU0 and GPU1 have no NVLink (SYS)"),
        ({"a": nccl_table(), "b": nccl_table()}, "b.txt: measures the same links as"),
        ({"a": nccl_table(hosts=("n1", "n1", "n2", "n2"))}, "a.txt: 4 ranks on 2 hosts mix links"),
        ({"a": nccl_table(hosts=("n1", "n2"))}, "inter_node: no text says how many cards a node has"),
    ],
)
def test_what_a_cluster_file_cannot_say_is_refused(texts: dict[str, str], problem: str, tmp_path: Path) -> None:
    assert problem in refusal(imported(tmp_path, **texts))
    assert not (tmp_path / "mine.yaml").exists()


def test_nothing_but_a_cluster_file_is_replaced(tmp_path: Path) -> None:
    assert imported(tmp_path, topo=topology(4)).exit_code == 0
    assert imported(tmp_path, topo=topology(2)).exit_code == 0
    assert load_cluster(tmp_path / "mine.yaml").gpus_per_node == 2
    (tmp_path / "mine.yaml").write_text("mine: true\n")
    assert "mine.yaml: exists and is no cluster file" in refusal(imported(tmp_path, topo=topology(4)))
    assert (tmp_path / "mine.yaml").read_text() == "mine: true\n"
    topo = tmp_path / "topo.txt"
    for name in ("mine.json", "mine"):
        result = invoke("cluster", "--topology", topo, "--base", "h100-nvlink-8", "-o", tmp_path / name)
        assert refusal(result).endswith("must end in .yaml")


def slow(**changes: Any) -> dict[str, Any]:
    document = tiny.cluster(nodes=2).model_dump(mode="json")
    document["gpu"]["peak_flops_per_us"] = 10e3
    document["intra_node"]["bandwidth_bytes_per_us"] = document["inter_node"]["bandwidth_bytes_per_us"] = 100.0
    for place, value in changes.items():
        field = "peak_flops_per_us" if place == "gpu" else "bandwidth_bytes_per_us"
        document[place][field] = value
    parse_cluster(document, source="here")
    return document


@pytest.mark.parametrize(
    ("changes", "warnings"),
    [
        ({}, []),
        ({"intra_node": 99.0}, ["intra_node.bandwidth_bytes_per_us: 99 is 99 MB/s"]),
        (
            {"inter_node": 0.5, "gpu": 989.0},
            ["inter_node.bandwidth_bytes_per_us: 0.5 is 0.5 MB/s", "gpu.peak_flops_per_us: 989 is 0.989 GFLOP/s"],
        ),
    ],
)
def test_rates_that_are_hardly_meant_are_warned_of(changes: Any, warnings: list[str], tmp_path: Path) -> None:
    path = tmp_path / "base.yaml"
    path.write_text(yaml.safe_dump(slow(**changes)))
    result = imported(tmp_path, "--json", base=str(path), topo=topology(4))
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)
    said = [f"warning: {name}: {line}" for name in (path, tmp_path / "mine.yaml") for line in warnings]
    assert result.stderr.splitlines() == said


def test_plan_and_simulate_say_what_of_the_cluster_is_used_and_warn(tmp_path: Path) -> None:
    trace, plan = tmp_path / "trace", tmp_path / "plan.json"
    shape = ("--seq-len", 1024, "--heads", 2, "--kv-heads", 1, "--layers", 1, "--steps", 1)
    made = invoke("synthesize", "vertical-slash", "-o", trace, *shape)
    assert made.exit_code == 0, made.output
    slow_one = tmp_path / "slow.yaml"
    document = load_cluster("local-cpu-4").model_dump(mode="json", exclude_none=True)
    document["intra_node"]["bandwidth_bytes_per_us"] = 10.0
    slow_one.write_text(yaml.safe_dump(document))
    warning = f"warning: {slow_one}: intra_node.bandwidth_bytes_per_us: 10 is 10 MB/s"
    planned = ("plan", "--trace", trace, "--layout", "ring", "--placement", "striped", "-o", plan, "--json")
    result = invoke(*planned, "--cluster", slow_one)
    assert result.exit_code == 0, result.output
    assert warning in result.stderr.splitlines()

    played = ("simulate", plan, "--trace", trace, "--cluster")
    whole, part = invoke(*played, slow_one), invoke(*played, "a100-hdr-4x8")
    assert warning in whole.stderr.splitlines()
    assert "GPUs are used" not in whole.stdout
    assert "warning" not in part.stderr
    assert "4 of the cluster's 32 GPUs are used" in part.stdout
    assert json.loads(invoke(*played, "a100-hdr-4x8", "--json").stdout)["gpus"] == {"used": 4, "of": 32}

    small = load_cluster("local-cpu-4").model_copy(update={"gpus_per_node": 2}).model_dump(mode="json")
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(small))
    refused = invoke(*played, tmp_path / "small.yaml")
    assert (refused.exit_code, refused.stdout) == (2, "")
    assert refused.stderr.splitlines()[-1] == "sparsering: cluster: local-cpu-4 has 2 GPUs, the schedule 4 ranks"
