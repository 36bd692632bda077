"""What a trace says, worked out by hand, and what `inspect` says of a corrupt one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import tiny
from sparsering.traces.dataset.manifest import ModelShape
from sparsering.traces.dataset.rows import HeadChoice
from sparsering.traces.dataset.store import Trace
from sparsering.traces.dataset.writer import TraceWriter
from sparsering.traces.pattern import BlockMask, LayerPattern
from sparsering.traces.stats import block_overlap, describe, step_overlap


def test_statistics_by_hand(tmp_path: Path) -> None:
    def heads(columns: list[int], diagonals: list[int], pairs: list[tuple[int, int]]) -> tuple:
        bits = np.zeros((4, 4), dtype=bool)
        bits[tuple(np.array(pairs).T)] = True
        return tiny.slash(columns, diagonals), BlockMask(bits=bits)

    first, second = heads([1, 2, 3], [0, 2], [(0, 0), (3, 1)]), heads([2, 3, 4, 5], [0, 1], [(3, 1), (3, 2)])
    shape = ModelShape(model_id="m", layers=1, heads=2, kv_heads=2, head_dim=8)
    head = tiny.trace_header(model=shape, recorded_layers=(0,), seq_len_tokens=64)
    records = [LayerPattern(seq_len_tokens=64, block_size=16, heads=both) for both in (first, second)]
    with TraceWriter(tmp_path, head) as writer:
        for step, (record, mass) in enumerate(zip(records, (0.5, 0.75), strict=True)):
            writer.append(step, {0: (record, [HeadChoice(selector="s", kept_mass_sampled=mass)] * 2)})
    trace = Trace.open(tmp_path)

    assert block_overlap(first[0], second[0], 4) == pytest.approx(4 / 9)  # diagonals of 4, 3 and 2 pairs
    assert block_overlap(first[1], second[1], 4) == pytest.approx(1 / 3)
    overlap = step_overlap(trace, 0, 1)
    assert overlap["columns"] == pytest.approx((2 / 5 + 1) / 2)
    assert overlap["blocks"] == pytest.approx((4 / 9 + 1 / 3) / 2)
    (summary,) = describe(trace)["layers"]
    assert summary["density_mean"] == pytest.approx((6 + 2 + 7 + 2) / 4 / 10)
    assert (summary["columns_max"], summary["columns_mean"]) == (4, 7 / 4)
    assert summary["kept_mass_sampled_mean"] == pytest.approx(0.625)
    assert summary["kept_mass_probe_mean"] is None


def run_cli(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "sparsering.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_inspect_exits_with_2_and_one_line_for_a_corrupt_trace(trace_folder: Path) -> None:
    good = run_cli("inspect", trace_folder, "--json")
    assert good.returncode == 0, good.stderr
    assert json.loads(good.stdout)["digest"] == Trace.open(trace_folder).digest()
    part = trace_folder / "part-00000005.parquet"
    data = bytearray(part.read_bytes())
    data[len(data) // 2] ^= 16
    part.write_bytes(data)
    bad = run_cli("inspect", trace_folder)
    assert (bad.returncode, bad.stdout) == (2, "")
    assert bad.stderr.startswith(f"sparsering: {part}: sha256: ") and bad.stderr.count("\n") == 1
