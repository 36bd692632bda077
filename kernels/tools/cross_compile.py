"""Compile the kernels for a GPU that is not here and read what they need: registers, stack, shared memory.

Nothing runs; Triton brings the assembler. TRITON_INTERPRET must not be set.
    python -m sparsering.kernels.cross_compile 80 --head-dims 128 64 --blocks 128 64
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ..triton import backward, columns, forward, tuning
from ..triton.launching import BLOCK_ONLY, COLUMN_ONLY

KERNELS = {
    tuning.FORWARD: forward.forward_kernel,
    tuning.FUSED_FORWARD: forward.forward_kernel,
    tuning.COLUMN_FORWARD: forward.forward_kernel,
    tuning.GRAD_Q: backward.grad_q_kernel,
    tuning.FUSED_GRAD_Q: backward.grad_q_kernel,
    tuning.COLUMN_GRAD_Q: backward.grad_q_kernel,
    tuning.GRAD_KV: backward.grad_kv_kernel,
    tuning.COLUMN_GRAD_KV: columns.column_grad_kv_kernel,
}
_OF_DQ = (tuning.GRAD_Q, tuning.FUSED_GRAD_Q, tuning.COLUMN_GRAD_Q)
SHARED_LIMIT_BYTES = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
# The forward writes bfloat16 where nothing will be merged, else the accumulator's dtype.
_TILED = {"q": "m", "grad_out": "m", "k": "n", "v": "n", "column_k": "n", "column_v": "n"}
_ADDED = {"grad_q": "m", "grad_k": "n", "grad_v": "n", "prior": "m"}
_FLOATS = {"out", "prior", "lse", "row_values", "grad_q", "grad_k", "grad_v"}
_INTEGERS = {
    "row_fields",
    "entries",
    "order",
    "columns",
    "limits",
    "first_tile",
    "has_own",
    "q_blocks",
    "q_documents",
    "k_documents",
    "column_documents",
}


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What one compiled kernel takes: registers a thread, stack bytes a thread (spills), shared bytes a program."""

    registers: int
    stack_bytes: int
    shared_bytes: int
    cubin: bytes


def resources(
    kernel: str,
    *,
    capability: int,
    dtype: str = "bf16",
    block_size: int = 128,
    head_dim: int = 128,
    group: int = 8,
    documents: bool = False,
    merge: bool = False,
    final: bool = False,
    own: bool = False,
    launch: tuning.Launch | None = None,
) -> Resources:
    """Compile one kernel of KERNELS for sm_<capability> with its tuned settings, or the ones given.

    merge: the forward goes on from an earlier partial. final: it, or dQ, is the last of several launches, and writes
    the inputs' dtype.
    """
    launch = launch or tuning.launch_for(
        kernel, capability=capability, block_size=block_size, head_dim=head_dim, itemsize=2
    )
    constants: dict[str, Any] = {
        "GROUP": group,
        "BLOCK": block_size,
        "M": launch.m,
        "N": launch.n,
        "D": head_dim,
        "SIGN": -1,
        "DOCUMENTS": documents,
        "OWN": own or kernel == tuning.COLUMN_GRAD_KV,
        "SPLIT": False,
        "TMA": launch.tma,
        "MERGE": merge or final,
        "PRIOR": final,
        "ADD": not (final and kernel in _OF_DQ),
        "ACC": tl.float32,
        "PRECISION": "tf32",
        "BLOCKS": not kernel.startswith("column"),
        "COLUMNS": kernel.startswith(("column", "fused")),
    }
    if not (merge or final) or (kernel in _OF_DQ and not final):
        constants["prior"] = None
    if not documents:
        constants |= dict.fromkeys(("q_documents", "k_documents", "column_documents"))
    if kernel != tuning.COLUMN_GRAD_KV:
        constants |= dict.fromkeys(() if constants["COLUMNS"] else COLUMN_ONLY)
        constants |= dict.fromkeys(() if constants["BLOCKS"] else BLOCK_ONLY)
    function = KERNELS[kernel]
    names = function.arg_names
    constants = {name: value for name, value in constants.items() if name in names}
    signature = {
        name: "constexpr" if name in constants else _type(kernel, name, dtype, head_dim, launch, merge, final)
        for name in names
    }
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if signature[name].startswith("*") or re.search(r"_[bsh]$|^padded$", name)
    }
    source = ASTSource(function, signature, {(names.index(n),): v for n, v in constants.items()}, aligned)
    compiled = triton.compile(
        source,
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": launch.warps, "num_stages": launch.stages, **launch.options()},
    )
    registers, stack = _read_usage(compiled.asm["cubin"])
    return Resources(
        registers=registers, stack_bytes=stack, shared_bytes=compiled.metadata.shared, cubin=compiled.asm["cubin"]
    )


def _type(kernel: str, name: str, dtype: str, head_dim: int, launch: tuning.Launch, merge: bool, final: bool) -> str:
    if name in _TILED:
        rows = getattr(launch, _TILED[name])
        return f"tensordesc<{dtype}[1, 1, {rows}, {head_dim}]>" if launch.tma else f"*{dtype}"
    if name == "row_values" and launch.tma and kernel in (tuning.GRAD_KV, tuning.COLUMN_GRAD_KV):
        return f"tensordesc<fp32[1, {launch.m}]>"
    if name in ("grad_k", "grad_v") and kernel == tuning.COLUMN_GRAD_KV and launch.tma:
        return f"tensordesc<fp32[1, {launch.n}, {head_dim}]>"
    if final and name in ("out", "grad_q"):
        return f"tensordesc<{dtype}[1, 1, {launch.m}, {head_dim}]>" if launch.tma else f"*{dtype}"
    if name in _ADDED and launch.tma:
        return f"tensordesc<fp32[1, 1, {getattr(launch, _ADDED[name])}, {head_dim}]>"
    if name == "out" and launch.tma:
        return f"tensordesc<{'fp32' if merge else dtype}[1, 1, {launch.m}, {head_dim}]>"
    if name in _FLOATS:
        return "*fp32"
    if name in _INTEGERS:
        return "*i32"
    if name == "usable":
        return "*i64"
    return "fp32" if name.startswith("scale") else "i32"


def _read_usage(cubin: bytes) -> tuple[int, int]:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [str(tool), "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = re.search(r"REG:(\d+)\s+STACK:(\d+)", text)
    if found is None:
        raise RuntimeError(f"cuobjdump: no resource usage in {text!r}")
    return int(found.group(1)), int(found.group(2))


def main() -> None:
    """Print one JSON line per kernel and shape: registers, stack_bytes, shared_bytes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("capability", type=int, choices=sorted(SHARED_LIMIT_BYTES))
    parser.add_argument("--head-dims", type=int, nargs="+", default=[128])
    parser.add_argument("--blocks", type=int, nargs="+", default=[128])
    parser.add_argument("--kernels", nargs="+", choices=list(KERNELS), default=list(KERNELS))
    parser.add_argument("--documents", action="store_true")
    parser.add_argument("--own", action="store_true", help="columns inside blocks that are not active, too")
    arguments = parser.parse_args()
    for kernel in arguments.kernels:
        for head_dim in arguments.head_dims:
            for block in arguments.blocks:
                found = resources(
                    kernel,
                    capability=arguments.capability,
                    head_dim=head_dim,
                    block_size=block,
                    documents=arguments.documents,
                    own=arguments.own,
                )
                print(
                    json.dumps(
                        {
                            "kernel": kernel,
                            "head_dim": head_dim,
                            "block": block,
                            "registers": found.registers,
                            "stack_bytes": found.stack_bytes,
                            "shared_bytes": found.shared_bytes,
                        }
                    ),
                    flush=True,
                )


if __name__ == "__main__":
    main()
