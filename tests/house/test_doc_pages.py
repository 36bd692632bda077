"""Pages that scripts write are current, files that pages show are shown as they are, and figures name their sources."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from source_files import DOCUMENTS, ROOT, between, document_id, load_script
from sparsering.kernels.mask import AttentionMask
from sparsering.kernels.plain.reference import reference_attention

RESULTS = ROOT / "benchmarks/results"
RING = "ring_forward.py"
# Runs the ring of docs/ as the main program would, on given tensors, and keeps what each rank returns.
DRIVER = """
import runpy, torch, torch.distributed as dist
from safetensors.torch import load_file, save_file
ring = runpy.run_path("ring_forward.py")["ring_forward"]
dist.init_process_group("gloo")
rank, world, given = dist.get_rank(), dist.get_world_size(), load_file("given.safetensors")
positions = [given[f"positions.{owner}"] for owner in range(world)]
out, lse = ring(*(given[name][:, positions[rank]] for name in "qkv"), positions)
save_file({"out": out.contiguous(), "lse": lse.contiguous()}, f"rank-{rank}.safetensors")
"""


def test_the_map_of_folders_is_current_and_every_folder_says_what_it_is():
    script = load_script("write_map")
    shown = between((ROOT / "docs/architecture.md").read_text(), script.BEGIN, script.END)
    assert shown == script.rendered(), "`make map` rewrites it"
    folders = re.findall(r"^\| `([\w/]+)/` \| \S", shown, re.MULTILINE)
    files = [path for house in script.HOUSES for path in (ROOT / house).rglob("*.py")]
    assert sorted(folders) == sorted({path.parent.relative_to(ROOT).as_posix() for path in files})


def test_what_pages_say_of_registered_layouts_and_selectors_is_current():
    script = load_script("write_registries")
    for (name, begin, end), text in script.PARTS.items():
        assert between((ROOT / "docs" / name).read_text(), begin, end) == text(), "`make docs` rewrites it"
    assert all(f"\n### `{layout.name}`\n" in script.layouts_text() for layout in script.shipped_layouts())


def test_figures_are_current():
    script = load_script("write_figures")
    assert script.FIGURE.read_text() == script.rendered(), "`make docs` rewrites it"


@pytest.mark.parametrize("document", sorted((ROOT / "docs").rglob("*.md")), ids=document_id)
def test_files_are_shown_as_they_are(document: Path):
    assert document.read_text() == load_script("write_includes").filled(document), "`make docs` rewrites it"


def test_worked_examples_are_shown_where_extending_is_explained():
    shown = re.findall(r"<!-- file: (\S+) -->", (ROOT / "docs/extending.md").read_text())
    examples = {path for kind in ("layout", "selector", "backend") for path in ROOT.glob(f"tests/**/new_{kind}.py")}
    assert {(ROOT / "docs" / name).resolve() for name in shown} == examples


def test_measured_pages_are_current_and_hold_every_result():
    script = load_script("write_measured")
    results = script.all_results()
    pages = {result.benchmark: script.page_of(result.benchmark) for result in results}
    for benchmark in pages.keys() - script.ELSEWHERE:
        shown = between(pages[benchmark].read_text(), script.BEGIN, script.END)
        assert shown == script.rendered(benchmark, results), "`make measured` rewrites it"
        assert all(f"`{result.name}`" in shown for result in results if result.benchmark == benchmark)
    listed = (ROOT / "docs/measured/README.md").read_text()
    linked = {ROOT / "docs/measured" / name for name in re.findall(r"\]\((\w+\.md)\)", listed)}
    assert linked == {page for benchmark, page in pages.items() if benchmark not in script.ELSEWHERE}


def test_the_page_on_learning_is_current():
    script = load_script("write_learning")
    found = script.compared(script.all_rows())
    assert between(script.PAGE.read_text(), script.BEGIN, script.END) == script.rendered(found), "`make measured`"
    assert script.FIGURE.exists() == bool(found)
    assert not found or script.FIGURE.read_text() == script.drawn(found), "`make measured` redraws it"


def _judged(arm: str, selector: str, loss: float, **more: Any) -> dict[str, Any]:
    buckets = [{"first": first, "tokens": 10, "mean": loss + first / 2**20} for first in (0, 8192, 32768)]
    readings = [{"quantity": "loss", "arm": "dense" if selector == "dense" else "sparse", "buckets": buckets}]
    same = {"study": "s", "base": "b", "steps": 4, "seed": 0, "learning_rate": 0.1, "heldout_digest": "d"}
    own = {"arm": arm, "selector": selector, "heldout_loss": loss, "heldout_loss_dense": None, "total_density": None}
    where = {"file": "f", "where": "here"}
    return same | own | where | {"readings": readings, "needle_last": 0.5, "needle_mid": 0.25} | more


def test_arms_are_compared_with_the_dense_one_of_their_kind():
    script = load_script("write_learning")
    sparse = {"heldout_loss_dense": 1.01, "total_density": 0.1, "needle_mid": 0.2}
    timed = [{"arm": arm, "study": "s", "file": "t", "step_ms": ms} for arm, ms in (("a", 30.0), ("dense", 20.0))]
    rows = [
        _judged("dense", "dense", 1.0),
        _judged("a", "block-mass", 1.02, **sparse),
        _judged("b", "block-mass", 1.0, **sparse, learning_rate=0.2),  # no dense arm had that rate
        _judged("c", "block-mass", 1.0, **sparse, base="another"),  # was trained and judged otherwise
        _judged("d", "block-mass", 1.03, **sparse, study="follows"),
        *timed,
    ]
    dense, a, d = script.compared(rows)
    assert (dense.row["arm"], a.row["arm"], d.row["arm"]) == ("dense", "a", "d")
    assert d.gap == pytest.approx(0.03) and d.step_ratio is None
    assert script.rendered([dense, a, d]).startswith("\n### `follows`, `s`\n\nOn here.\n\n| step time")
    assert (round(a.gap, 6), round(a.gap_attended_densely, 6), dense.gap) == (0.02, 0.01, 0.0)
    assert a.worst_far_bucket == pytest.approx(0.02 / (1 + 8192 / 2**20))
    assert a.needle_points("mid") == pytest.approx(-5) and a.needle_points("last") == 0
    head, _, first, second = script.arms_table([dense, a])
    assert head.startswith("| step time ÷ dense | arm | density, columns counted |")
    assert first.startswith("| 1.00 | dense | 100.0 % |")
    assert second.startswith("| 1.50 **slower than dense** | a | 10.0 % |") and "| +2.00 % | +1.00 % |" in second
    assert ">a</text>" in script.drawn([dense, a]) and ">dense</text>" not in script.drawn([dense, a])


def test_a_table_of_results_compares_within_its_file():
    script = load_script("write_measured")
    rows = [{"impl": "a", "ms": 2.0}, {"impl": "b", "ms": 3.0}, {"impl": "c", "ms": None}]
    fast = script.quickest(rows[:2], (), lambda row: row["ms"])
    columns = [
        script.Column(heading="who", cell=script.plain("impl")),
        script.Column(heading="ms", cell=script.measured("ms")),
        script.Column(heading="÷", cell=fast),
        script.Column(heading="nothing", cell=script.plain("missing")),
    ]
    table = ["| who | ms | ÷ |", "|---|---|---|", "| a | 2.00 | 1.00 |", "| b | 3.00 | 1.50 |"]
    assert script.table(columns, rows[:2]) == table
    shown = [script.number(value) for value in (None, 0.0, 0.1234, 56.78, 1234.5)]
    assert shown == ["", "0.00", "0.123", "56.8", "1,234"]


@pytest.mark.parametrize("document", DOCUMENTS, ids=document_id)
def test_result_files_named_in_texts_exist(document: Path):
    named = re.findall(r"`((?:\w+)-[\w.-]+Z[\w-]*\.json)`", document.read_text())
    assert [name for name in named if not (RESULTS / name).exists()] == []


@pytest.mark.parametrize("world_size", [2, 3])
def test_the_ring_written_by_hand_equals_the_reference(world_size: int, tmp_path: Path):
    heads, tokens, stripe = 2, world_size * 32, 8
    generator = torch.Generator().manual_seed(1)
    q, k, v = torch.randn(3, heads, tokens, 8, dtype=torch.float64, generator=generator)
    stripes = torch.arange(tokens).view(-1, world_size, stripe)
    positions = {f"positions.{rank}": stripes[:, rank].flatten() for rank in range(world_size)}
    given = {"q": q.contiguous(), "k": k.contiguous(), "v": v.contiguous(), **positions}
    run_ranks(world_size, given, tmp_path)
    blocks = tokens // stripe
    mask = AttentionMask(seq_len_tokens=tokens, block_size=stripe, active=torch.ones(heads, blocks, dtype=torch.bool))
    wide = [x.transpose(0, 1)[None] for x in (q, k, v)]
    out, lse = reference_attention(wide[0], wide[1], wide[2], mask, scale=8**-0.5)
    for rank in range(world_size):
        own, found = positions[f"positions.{rank}"], load_file(tmp_path / f"rank-{rank}.safetensors")
        torch.testing.assert_close(found["out"], out[0, own].transpose(0, 1), rtol=0, atol=1e-12)
        torch.testing.assert_close(found["lse"], lse[0][:, own], rtol=0, atol=1e-12)


def run_ranks(world_size: int, given: dict[str, torch.Tensor], folder: Path) -> None:
    """Play the ring on gloo processes; each leaves `rank-<rank>.safetensors`."""
    save_file(given, folder / "given.safetensors")
    (folder / RING).write_text((ROOT / "docs" / RING).read_text())
    (folder / "driver.py").write_text(DRIVER)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world_size)]
    environment = os.environ | {"PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*launcher, "driver.py"], cwd=folder, env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]
