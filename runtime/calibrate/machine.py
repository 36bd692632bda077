"""What this machine is, and the two rates that its memory and its matrix units reach."""

from __future__ import annotations

import platform
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

MATMUL_SIZE, COPY_BYTES, HOST_BYTES, REPEATS = 8192, 1 << 30, 1 << 28, 7
CPU_CACHE_BYTES = 32 << 20


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Of one device, per microsecond: bytes of its memory read and written, bfloat16 FLOPs, bytes to or from the host.

    host_bytes_per_us: of the slower way, from and to pinned memory; None on CPUs.
    """

    memory_bytes_per_us: float
    flops_per_us: float
    host_bytes_per_us: float | None


def machine_facts(device: torch.device) -> dict[str, Any]:
    """Return what points of two calibrations must share: the device's name and sizes, and the versions of libraries."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    if device.type != "cuda":
        return {"device": platform.processor() or platform.machine(), "versions": versions}
    import triton

    properties: Any = torch.cuda.get_device_properties(device)
    return {
        "device": properties.name,
        "memory_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "cache_bytes": properties.L2_cache_size,
        "capability": [properties.major, properties.minor],
        "versions": versions | {"cuda": str(torch.version.cuda), "triton": triton.__version__},
    }


def measure_rates(device: torch.device) -> Rates:
    """Time a copy within the device's memory, a matrix product, and copies to and from the host."""
    on_gpu = device.type == "cuda"
    nbytes, size = (COPY_BYTES, MATMUL_SIZE) if on_gpu else (1 << 26, 1024)
    source = torch.empty(nbytes, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16 if on_gpu else torch.float32)
    out = torch.empty_like(a)
    copy_us = _median_us(lambda: target.copy_(source), device)
    matmul_us = _median_us(lambda: torch.mm(a, a, out=out), device)
    host_us = None
    if on_gpu:
        part, pinned = source[:HOST_BYTES], torch.empty(HOST_BYTES, dtype=torch.uint8, pin_memory=True)
        ways = (lambda: pinned.copy_(part, non_blocking=True), lambda: part.copy_(pinned, non_blocking=True))
        host_us = max(_median_us(way, device) for way in ways)
    return Rates(
        memory_bytes_per_us=2 * nbytes / copy_us,
        flops_per_us=2 * size**3 / matmul_us,
        host_bytes_per_us=None if host_us is None else HOST_BYTES / host_us,
    )


def _median_us(work: Callable[[], Any], device: torch.device) -> float:
    from .points import once

    return statistics.median(once(lambda: None, lambda _: work(), device).device_us for _ in range(REPEATS))
