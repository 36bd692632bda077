"""Every Triton kernel compiled for GPUs that are not here: no spills, and shared memory that fits.

Compiling and interpreting exclude each other in one process (TRITON_INTERPRET is read when a kernel is defined), so the
compiler runs in its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

LIMIT_BYTES = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
# (capability, head dims, blocks, kernels; none means all)
# On sm_80 launches that spill a little are a fifth quicker than the best ones that do not (kernels/triton/tuning.py).
SPILLED_BYTES = {80: 640, 90: 0, 100: 0}
JOBS = [
    (80, [128], [128], []),
    (80, [64], [128, 64], []),
    (90, [128], [128], []),
    (90, [64], [64], ["forward", "grad_q", "grad_kv"]),
    (100, [128], [128], ["forward", "grad_q", "grad_kv", "column_grad_kv"]),
]
# Wide heads; sm_90 and sm_100 share launches, which were looked for on sm_90.
WIDE_JOBS = [(80, 256, 16), (80, 512, 0), (90, 256, 24), (90, 512, 0), (100, 256, 464), (100, 512, 0)]


# What decides element by element takes a few registers more, in kernels of their own.
ELEMENT_JOBS = [
    (80, "--windows"),
    (90, "--windows"),
    (90, "--softcap"),
    (100, "--windows"),
    (80, "--anchors"),
    (90, "--anchors"),
]
ELEMENT_SPILLED_BYTES = {80: 900, 90: 200, 100: 0}


def compile_all(
    capability: int, head_dims: list[int], blocks: list[int], kernels: list[str], *options: str
) -> list[dict[str, int]]:
    """Rows of `python -m sparsering.kernels.cross_compile`, in a process where the interpreter is off."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [
        sys.executable,
        "-m",
        "sparsering.kernels.tools.cross_compile",
        str(capability),
        "--head-dims",
        *map(str, head_dims),
        "--blocks",
        *map(str, blocks),
        *(["--kernels", *kernels] if kernels else []),
        *options,
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("capability", "head_dims", "blocks", "kernels"), JOBS, ids=[f"sm_{job[0]}-d{job[1][0]}" for job in JOBS]
)
def test_fits(capability: int, head_dims: list[int], blocks: list[int], kernels: list[str]) -> None:
    rows = compile_all(capability, head_dims, blocks, kernels)
    assert len(rows) == len(head_dims) * len(blocks) * (len(kernels) or 8)
    spilled = [row for row in rows if row["stack_bytes"] > SPILLED_BYTES[capability]]
    assert not spilled, f"registers spill to the stack: {spilled}"
    large = [row for row in rows if row["shared_bytes"] > LIMIT_BYTES[capability]]
    assert not large, f"more shared memory than sm_{capability} has: {large}"


@pytest.mark.slow
@pytest.mark.parametrize(("capability", "head_dim", "spilled_bytes"), WIDE_JOBS)
def test_wide_heads_fit(capability: int, head_dim: int, spilled_bytes: int) -> None:
    rows = compile_all(capability, [head_dim], [128], [])
    assert len(rows) == 8
    assert not [row for row in rows if row["stack_bytes"] > spilled_bytes]
    assert not [row for row in rows if row["shared_bytes"] > LIMIT_BYTES[capability]]


@pytest.mark.slow
@pytest.mark.parametrize(("capability", "option"), ELEMENT_JOBS)
def test_what_decides_by_element_fits(capability: int, option: str) -> None:
    kernels = ["forward", "fused_forward", "grad_q", "grad_kv"]
    rows = compile_all(capability, [128], [128], kernels, option)
    assert len(rows) == len(kernels)
    assert not [row for row in rows if row["stack_bytes"] > ELEMENT_SPILLED_BYTES[capability]]
    assert not [row for row in rows if row["shared_bytes"] > LIMIT_BYTES[capability]]
