"""compute-sanitizer over the Triton kernels: no access outside of what was allocated, no race in shared memory."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SUPPORT, JOB = Path(__file__).parents[2] / "support", Path(__file__).with_name("sanitized_kernels.py")
FOUND = 97  # exit code when the sanitizer has found something
TOOL = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"


@pytest.mark.gpu
@pytest.mark.timeout(500)
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_nothing_is_found(tool: str) -> None:
    if not Path(TOOL).exists():
        pytest.skip("needs compute-sanitizer, which comes with CUDA's toolkit")
    environment = os.environ | {
        "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",
        "PYTHONPATH": os.pathsep.join([str(SUPPORT), os.environ.get("PYTHONPATH", "")]),
    }
    command = [TOOL, "--tool", tool, "--error-exitcode", str(FOUND), sys.executable, str(JOB)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=480, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert "ERROR SUMMARY: 0 errors" in done.stdout or "0 hazards displayed" in done.stdout, done.stdout[-1000:]
