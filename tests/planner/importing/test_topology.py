"""The matrix of `nvidia-smi topo -m`: what it says of a node, and what a cluster file cannot say of it."""

from __future__ import annotations

from pathlib import Path

import pytest

import tool_texts
from sparsering.planner.importing.topology import Topology, read_topology
from sparsering.traces.errors import InputError, UnsupportedError

CARDS = tuple(f"NIC{number}" for number in range(8))


def read(tmp_path: Path, text: str) -> Topology:
    path = tmp_path / "topo.txt"
    path.write_text(text)
    return read_topology(path)


def refusal(tmp_path: Path, text: str) -> str:
    with pytest.raises(InputError) as caught:
        read(tmp_path, text)
    assert "\n" not in str(caught.value)
    return str(caught.value).removeprefix(f"{tmp_path / 'topo.txt'}: ")


def test_eight_gpus_behind_a_switch(tmp_path: Path) -> None:
    found = read(tmp_path, tool_texts.topology(cards=CARDS))
    assert found == Topology(gpus=8, nvlinks=18, cards=CARDS)
    assert not found.may_be_a_mesh


def test_older_drivers_name_cards_in_the_matrix_and_have_no_legend(tmp_path: Path) -> None:
    text = tool_texts.topology(4, link=lambda a, b: "NV12", cards=("mlx5_0", "mlx5_1"), legend=False)
    text = "root@host:~# nvidia-smi topo -m\n" + text.replace("\tGPU NUMA ID", "").replace("\t", "   ")
    found = read(tmp_path, text)
    assert (found.gpus, found.nvlinks, found.cards) == (4, 12, ("mlx5_0", "mlx5_1"))
    assert found.remote_gpus == ("GPU2", "GPU3")


def test_cards_that_no_gpu_is_near_to_are_not_counted(tmp_path: Path) -> None:
    near = {(gpu, card): "PXB" for gpu in range(8) for card in range(4) if gpu // 2 == card}
    text = tool_texts.topology(cards=CARDS[:6], near=lambda gpu, card: near.get((gpu, card), "SYS"))
    found = read(tmp_path, text)
    assert (found.cards, found.far_cards, found.remote_gpus) == (CARDS[:4], CARDS[4:6], ())


def test_where_no_card_is_near_all_count(tmp_path: Path) -> None:
    found = read(tmp_path, tool_texts.topology(cards=CARDS[:2], near=lambda gpu, card: "PHB"))
    assert (found.cards, found.far_cards, found.remote_gpus) == (CARDS[:2], (), ())


@pytest.mark.parametrize(("gpus", "links", "mesh"), [(4, 4, True), (4, 12, False), (2, 12, False), (8, 2, True)])
def test_few_links_may_be_wires(gpus: int, links: int, mesh: bool, tmp_path: Path) -> None:
    assert read(tmp_path, tool_texts.topology(gpus, link=lambda a, b: f"NV{links}")).may_be_a_mesh is mesh


def test_one_gpu_has_no_links(tmp_path: Path) -> None:
    assert read(tmp_path, tool_texts.topology(1)) == Topology(gpus=1, nvlinks=0)


@pytest.mark.parametrize("path", ["SYS", "NODE", "PHB", "PXB", "PIX"])
def test_a_pair_without_nvlink_is_refused(path: str, tmp_path: Path) -> None:
    text = tool_texts.topology(4, link=lambda a, b: path if (a, b) == (1, 3) else "NV4")
    with pytest.raises(UnsupportedError, match=rf"GPU1 and GPU3 have no NVLink \({path}\)"):
        read(tmp_path, text)


def test_wires_of_unequal_width_are_refused(tmp_path: Path) -> None:
    text = tool_texts.topology(4, link=lambda a, b: "NV2" if b - a == 1 else "NV1")
    with pytest.raises(UnsupportedError, match=r"pairs of GPUs have NV1 \(as .*\), NV2 \(as .*\): wires of unequal"):
        read(tmp_path, text)


GOOD = tool_texts.topology(2)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "is not the matrix of `nvidia-smi topo -m`"),
        ("NVIDIA-SMI has failed\n", "is not the matrix of `nvidia-smi topo -m`"),
        (GOOD.replace("GPU1\tCPU", "GPU0\tCPU"), "is not the matrix of `nvidia-smi topo -m`"),
        (GOOD.splitlines()[0], "has no row for GPU0, GPU1"),
        ("\n".join(GOOD.splitlines()[:2]), "has no row for GPU1"),
        (GOOD.replace("NV18", "NV", 1), "GPU0: 'NV' is no link to GPU1"),
        (GOOD.replace("NV18", "X", 1), "GPU0: 'X' is no link to GPU1"),
        (GOOD.replace("NV18", "NV6", 1), "GPU0 to GPU1 is NV6, GPU1 to GPU0 is NV18"),
        ("GPU0 GPU1\nGPU0 X\n", "GPU0: has 1 of 2 columns"),
    ],
)
def test_a_broken_matrix_is_one_line(text: str, problem: str, tmp_path: Path) -> None:
    assert refusal(tmp_path, text).startswith(problem)


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "topo.txt").write_bytes(b"GPU0\xff")
    with pytest.raises(InputError, match="is not UTF-8"):
        read_topology(tmp_path / "topo.txt")
    with pytest.raises(InputError, match="cannot be read"):
        read_topology(tmp_path / "nowhere.txt")
