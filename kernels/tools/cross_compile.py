"""Compile the kernels for a GPU that is not here and read what they need: registers, stack, shared memory.

Nothing runs; Triton brings the assembler. TRITON_INTERPRET must not be set.
    python -m sparsering.kernels.tools.cross_compile 80 --head-dims 128 64 --blocks 128 64
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from itertools import product
from pathlib import Path
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ..triton import backward, columns, forward, tuning
from ..triton.views import (
    NO_STRIDES,
    BlockLists,
    ColumnChunks,
    ColumnLists,
    KeyRows,
    QueryTiles,
    Rows,
    Scale,
    Strides,
    TileStrides,
)

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
CAPABILITIES = (80, 90, 100)
GROUP = 8  # query heads of a K/V head
# Types of arguments, as Triton names them. Strides, and what is marked like this, are multiples of 16.
MULTIPLE = "i32:16"
STRIDES = Strides(MULTIPLE, MULTIPLE, MULTIPLE)
SCALE = Scale("fp32", "fp32")


def resources(
    kernel: str, *, capability: int, head_dim: int, block_size: int, documents: bool = False, own: bool = False,
    windows: bool = False, softcap: bool = False, anchors: bool = False,
) -> dict[str, int]:  # fmt: skip
    """Compile one kernel of KERNELS for sm_<capability>: what it takes.

    registers a thread, stack_bytes a thread (spills), shared_bytes a program. Inputs are bfloat16; documents: packed
    ones; own: columns inside blocks that are not active, too; windows: that cut blocks; softcap: of the scores;
    anchors: columns of all packed documents.
    """
    launch = tuning.launch_for(kernel, capability=capability, block_size=block_size, head_dim=head_dim, itemsize=2)
    function = KERNELS[kernel]
    given = _arguments(
        kernel, launch, head_dim=head_dim, documents="*i32" if documents or anchors else None, own=own or windows
    )
    if windows and given["blocks"].fields is not None:
        given["blocks"] = given["blocks"]._replace(edges="*i32")
    if windows and given["columns"].positions is not None:
        given["columns"] = given["columns"]._replace(windows="*i32")
    if anchors and given["columns"].positions is not None:
        given["columns"] = given["columns"]._replace(anchors="i32")
    if softcap:
        given["scale"] = SCALE._replace(softcap="fp32")
    given |= {"BLOCK": block_size, "M": launch.m, "N": launch.n, "D": head_dim, "TMA": launch.tma}
    signature: dict[str, Any] = {}
    constants: dict[tuple[int, ...], Any] = {}
    aligned: dict[tuple[int, ...], list[list[Any]]] = {}
    for number, name in enumerate(function.arg_names):
        if name.isupper():
            signature[name], constants[number,] = "constexpr", given[name]
        else:
            signature[name] = _signature(given[name], (number,), constants, aligned)
    compiled = triton.compile(
        ASTSource(function, signature, constants, aligned),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": launch.warps, "num_stages": launch.stages, **launch.options()},
    )
    registers, stack = _read_usage(compiled.asm["cubin"])
    return {"registers": registers, "stack_bytes": stack, "shared_bytes": compiled.metadata.shared}


def _signature(
    given: Any, path: tuple[int, ...], constants: dict[tuple[int, ...], Any], aligned: dict[tuple[int, ...], Any]
) -> Any:
    """The types of an argument, or of all fields of a view; notes what is None, and what is a multiple of 16."""
    if isinstance(given, tuple):
        return type(given)(*(_signature(x, (*path, i), constants, aligned) for i, x in enumerate(given)))
    if given is None:
        constants[path] = None
        return "constexpr"
    if given == MULTIPLE or given.startswith("*"):
        aligned[path] = [["tt.divisibility", 16]]
    return given.removesuffix(":16")


def _arguments(
    kernel: str, launch: tuning.Launch, *, head_dim: int, documents: str | None, own: bool
) -> dict[str, Any]:
    """What launches give the kernel, in types; of all kernels, since names mean the same in each."""
    has_blocks, has_columns = not kernel.startswith("column"), kernel.startswith(("column", "fused"))
    of_keys, of_columns = kernel == tuning.GRAD_KV, kernel == tuning.COLUMN_GRAD_KV

    def tiles(rows: int, dtype: str = "bf16") -> str:
        return f"tensordesc<{dtype}[1, 1, {rows}, {head_dim}]>" if launch.tma else f"*{dtype}"

    queries, keys = tiles(launch.m), tiles(launch.n)
    grads, lines = tiles(launch.n, "fp32"), "*fp32"
    if launch.tma:
        lines = f"tensordesc<fp32[1, {launch.m}]>"
        grads = f"tensordesc<fp32[1, {launch.n}, {head_dim}]>" if of_columns else grads
    blocks = BlockLists("*i32", "*i32", documents, "i32") if has_blocks else BlockLists()
    q_blocks = "*i32" if own or of_columns else None
    lists = ColumnLists("*i32", "*i64", "*i32", documents, q_blocks, "i32", "i32") if has_columns else ColumnLists()
    key_at, column_at = (STRIDES if has else NO_STRIDES for has in (has_blocks, has_columns))
    return {
        "q": queries,
        "grad_out": queries,
        "k": keys if has_blocks else None,
        "v": keys if has_blocks else None,
        "column_k": keys if has_columns else None,
        "column_v": keys if has_columns else None,
        "out": queries if launch.tma else "*fp32",
        "grad_q": tiles(launch.m, "fp32"),
        "prior": None,
        "grad_k": grads,
        "grad_v": grads,
        "lse": Rows("*fp32", MULTIPLE, MULTIPLE),
        "row_values": lines if of_keys or of_columns else Rows("*fp32", MULTIPLE, MULTIPLE),
        "padded": MULTIPLE,
        "at": TileStrides(
            STRIDES, NO_STRIDES if of_keys else STRIDES, STRIDES, *[key_at] * 2, *[column_at] * 2, *[key_at] * 2
        ),
        "queries": QueryTiles(None if of_keys or of_columns else "*i32", documents, "i32", "i32", "i32"),
        "blocks": blocks,
        "columns": lists,
        "rows": KeyRows("*i32", "i32", "i32", "i32", "i32"),
        "chunks": ColumnChunks("*i32", "*i32", "i32", "i32"),
        "scale": SCALE,
        "q_tokens": "i32",
        "GROUP": GROUP if has_blocks else 1,
        "SIGN": -1,
        "SPLIT": False,
        "ADD": True,
        "ACC": tl.float32,
        "PRECISION": "tf32",
    }


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
    parser.add_argument("capability", type=int, choices=CAPABILITIES)
    parser.add_argument("--head-dims", type=int, nargs="+", default=[128])
    parser.add_argument("--blocks", type=int, nargs="+", default=[128])
    parser.add_argument("--kernels", nargs="+", choices=list(KERNELS), default=list(KERNELS))
    parser.add_argument("--documents", action="store_true")
    parser.add_argument("--own", action="store_true", help="columns inside blocks that are not active, too")
    parser.add_argument("--windows", action="store_true", help="sliding windows that cut blocks")
    parser.add_argument("--softcap", action="store_true", help="a softcap of the scores")
    parser.add_argument("--anchors", action="store_true", help="columns that all packed documents attend")
    given = parser.parse_args()
    for kernel, head_dim, block in product(given.kernels, given.head_dims, given.blocks):
        found = resources(
            kernel, capability=given.capability, head_dim=head_dim, block_size=block, documents=given.documents,
            own=given.own, windows=given.windows, softcap=given.softcap, anchors=given.anchors,
        )  # fmt: skip
        print(json.dumps({"kernel": kernel, "head_dim": head_dim, "block": block, **found}), flush=True)


if __name__ == "__main__":
    main()
