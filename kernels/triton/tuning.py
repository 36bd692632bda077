"""Launch settings per architecture: tile sizes, warps, pipeline stages, and how tiles are loaded.

The settings are data, found by tune.py and explained in docs/kernels.md. What `sparsering doctor --kernels --tune`
finds on another GPU goes into a file, from there into plans, and comes back here through `use`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch

FORWARD, GRAD_Q, GRAD_KV = "forward", "grad_q", "grad_kv"
FUSED_FORWARD, FUSED_GRAD_Q = "fused_forward", "fused_grad_q"  # block part and column part in one launch
COLUMN_FORWARD, COLUMN_GRAD_Q, COLUMN_GRAD_KV = "column_forward", "column_grad_q", "column_grad_kv"


@dataclass(frozen=True, kw_only=True)
class Launch:
    """M query rows, N keys, warps and stages of one kernel; tma: loads by tensor descriptors (sm_90 and later).

    registers: a cap per thread, 0 for none.
    """

    m: int
    n: int
    warps: int
    stages: int
    tma: bool
    registers: int = 0

    def options(self) -> dict[str, int]:
        """What else the compiler is told."""
        return {"maxnreg": self.registers} if self.registers else {}


# A100: pointer loads (cp.async). Found by a sweep of these very instructions, Triton's PTX for sm_80, on an H200: four
# warps with tiles 128 or 64 rows high reuse more of what they read from shared memory than eight warps do. Up to 600
# bytes a thread spill to the stack; the best launches that do not spill are a fifth slower (docs/kernels.md).
SM80 = {
    FORWARD: Launch(m=128, n=32, warps=4, stages=3, tma=False),
    GRAD_Q: Launch(m=128, n=32, warps=4, stages=2, tma=False),
    GRAD_KV: Launch(m=64, n=64, warps=4, stages=2, tma=False),
    FUSED_FORWARD: Launch(m=128, n=32, warps=4, stages=3, tma=False),
    FUSED_GRAD_Q: Launch(m=128, n=32, warps=4, stages=2, tma=False),
    COLUMN_FORWARD: Launch(m=128, n=32, warps=4, stages=2, tma=False),
    COLUMN_GRAD_Q: Launch(m=128, n=32, warps=4, stages=3, tma=False),
    COLUMN_GRAD_KV: Launch(m=64, n=64, warps=4, stages=3, tma=False),
}
# Kernels by whether a launch has blocks, and whether it has columns.
FORWARDS = {(True, False): FORWARD, (False, True): COLUMN_FORWARD, (True, True): FUSED_FORWARD}
GRAD_QS = {(True, False): GRAD_Q, (False, True): COLUMN_GRAD_Q, (True, True): FUSED_GRAD_Q}
# Hopper: 16-bit inputs, D 128, blocks of 128; other shapes derive from these below.
SM90 = {
    kernel: Launch(m=64, n=64, warps=4, stages=2, tma=True)
    if kernel not in FORWARDS.values()
    # 128 registers let two programs share an SM, also where the launch merges into an earlier partial.
    else Launch(m=128, n=64, warps=8, stages=2, tma=True, registers=128)
    for kernel in SM80
}


def _wide(forward: Launch, grad_q: Launch, grad_kv: Launch, column_grad_kv: Launch | None = None) -> dict[str, Launch]:
    """The launches of all kernels for one wide head dim, where only these differ."""
    found = {**dict.fromkeys(FORWARDS.values(), forward), **dict.fromkeys(GRAD_QS.values(), grad_q)}
    return found | {GRAD_KV: grad_kv, COLUMN_GRAD_KV: column_grad_kv or grad_kv}


# Heads of 256 (Gemma, latent attention's 192) and 512 (Gemma 4's full layers), by (architecture, head dim): the largest
# tiles of a sweep by cross_compile.py whose accumulators stay in registers and whose tiles fit into shared memory. Not
# yet timed on a GPU. Tiles below 64 rows are multiplied without wgmma, which loads by descriptors are made for.
WIDE: dict[tuple[int, int], dict[str, Launch]] = {
    (80, 256): _wide(
        Launch(m=128, n=32, warps=8, stages=2, tma=False),
        Launch(m=64, n=32, warps=8, stages=2, tma=False),
        Launch(m=32, n=32, warps=8, stages=2, tma=False),
    ),
    (80, 512): _wide(
        Launch(m=64, n=16, warps=8, stages=2, tma=False),
        Launch(m=32, n=32, warps=8, stages=1, tma=False),
        Launch(m=32, n=16, warps=8, stages=1, tma=False),
    ),
    (90, 256): _wide(
        Launch(m=128, n=64, warps=8, stages=2, tma=True),
        Launch(m=64, n=64, warps=8, stages=2, tma=True),
        Launch(m=32, n=64, warps=8, stages=2, tma=True),
        Launch(m=32, n=32, warps=8, stages=2, tma=False),
    ),
    (90, 512): _wide(
        Launch(m=64, n=32, warps=8, stages=2, tma=True),
        Launch(m=32, n=32, warps=8, stages=1, tma=False),
        Launch(m=16, n=16, warps=8, stages=1, tma=False),
    ),
}
TILE_SIZES = frozenset({16, 32, 64, 128})
# Of 32-bit inputs: four tiles of 32 such rows fit into shared memory.
WIDEST_ROW_BYTES = 1024
# These walk columns, whose bits they find in words of so many.
WORD_COLUMNS = 64
COLUMN_KERNELS = frozenset({FUSED_FORWARD, FUSED_GRAD_Q, COLUMN_FORWARD, COLUMN_GRAD_Q, COLUMN_GRAD_KV})
# Exceptions by (architecture, kernel, head dim, block size).
EXCEPTIONS: dict[tuple[int, str, int, int], Launch] = {
    (80, GRAD_KV, 64, 64): Launch(m=64, n=32, warps=4, stages=2, tma=False),  # wider tiles spill
    (90, FORWARD, 64, 128): Launch(m=64, n=64, warps=4, stages=2, tma=True),  # 451 against 374 TFLOP/s at 128x64
}
# What a sweep tries; no one else sets it.
OVERRIDES: dict[str, Launch] = {}
# What `use` was given, by (compute capability, kernel, head dim, block size); for 16-bit inputs.
GIVEN: dict[tuple[int, str, int, int], Launch] = {}


def use(*, capability: int, head_dim: int, block_size: int, launches: Mapping[str, Mapping[str, Any]]) -> None:
    """Prefer these launches (kernel -> fields of Launch) on this compute capability and shape, in this process.

    Raises ValueError for a kernel or a field that there is not, and for tiles that the kernels cannot cut blocks into.
    """
    found: dict[tuple[int, str, int, int], Launch] = {}
    for kernel, fields in launches.items():
        if kernel not in SM90:
            raise ValueError(f"launches: {kernel!r} is not one of {', '.join(SM90)}")
        unknown = sorted(set(fields) - set(Launch.__dataclass_fields__))
        if unknown:
            raise ValueError(f"launches.{kernel}: a launch has no {', '.join(unknown)}")
        found[capability, kernel, head_dim, block_size] = launch = Launch(**fields)
        # Nothing would fail later: rows would be left out, or bits of columns read twice.
        for name, size in (("m", launch.m), ("n", launch.n)):
            widest = min(block_size, WORD_COLUMNS) if name == "n" and kernel in COLUMN_KERNELS else block_size
            if size not in TILE_SIZES or size > widest:
                raise ValueError(f"launches.{kernel}.{name}: {size} is no power of two from 16 to {widest}")
    GIVEN.update(found)


def launch_for(kernel: str, *, capability: int, block_size: int, head_dim: int, itemsize: int) -> Launch:
    """Settings of one kernel on compute capability 80, 90, 100 ...; 0 means Triton's interpreter.

    Tiles never exceed a mask block. Wider inputs have small tiles and one stage, for shared memory.
    """
    if kernel in OVERRIDES:
        return OVERRIDES[kernel]
    if itemsize == 2 and (capability, kernel, head_dim, block_size) in GIVEN:
        return GIVEN[capability, kernel, head_dim, block_size]
    architecture, table = (90, SM90) if capability >= 90 else (80, SM80)
    wide = WIDE.get((architecture, head_dim))
    found = (wide or table)[kernel]
    if capability == 0:
        return replace(found, m=min(found.m, block_size, 64), n=min(found.n, block_size, 64), tma=False, registers=0)
    if itemsize == 2 and (architecture, kernel, head_dim, block_size) in EXCEPTIONS:
        return EXCEPTIONS[architecture, kernel, head_dim, block_size]
    found = replace(found, m=min(found.m, block_size), n=min(found.n, block_size))
    if wide is None and found.m * found.n <= 64 * 64 and capability >= 90:
        found = replace(found, warps=min(found.warps, 4), registers=0)
    if capability >= 100:
        found = replace(found, registers=0)  # accumulators live in tensor memory there; a cap spilled what is left
    if itemsize > 2:
        side = 32 if head_dim * itemsize <= WIDEST_ROW_BYTES else 16
        found = replace(found, m=min(found.m, side), n=min(found.n, side), warps=4, stages=1, tma=False, registers=0)
    return found


@lru_cache
def capability_of(device: torch.device) -> int:
    """Compute capability as a number (80, 90 ...), 0 on the CPU (Triton's interpreter)."""
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return major * 10 + minor
