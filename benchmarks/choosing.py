"""What choosing costs: every selector and its index, beside forward and backward of sparse attention, on one GPU.

Queries and keys are random, so that scores are as flat as can be: the work does not depend on them. The attention
beside it has a Toeplitz mask of --density without columns (the cheapest there is to hide behind). XAttention is set
beside its floor: 1 / (2 stride) of dense FLOPs at the rate of cuDNN's dense forward in the same run.
    python -m sparsering.benchmarks.choosing --seq-lens 131072 524288
"""

from __future__ import annotations

import argparse
import gc
from typing import Any

import torch

from ..kernels.api import WholeAttention
from ..kernels.mask import AttentionMask
from ..kernels.select.probe import ShardTensors
from ..kernels.select.registry import Selector, selectors
from ..kernels.select.rows.xattention import XAttention
from ..kernels.select.vertical_slash import FixedVerticalSlash
from .kernels import measure, shared_arguments, time_ms
from .lib.common import ResultFile
from .lib.kernel_impls import DENSE, SPARSE, Problem, index_bytes
from .lib.masks import density_of, slash_mask

WINDOW_SLASHES = 100  # forced by vertical-slash with fixed budgets


def run_length(arguments: argparse.Namespace, seq_len: int) -> list[dict[str, Any]]:
    """All rows of one sequence length."""
    heads, kv_heads = arguments.heads
    tensors = Problem.tensors(seq_len, heads, kv_heads, arguments.head_dim, arguments.seed)
    whole = Problem(*tensors, mask=None)
    dense = time_ms(lambda: DENSE["cudnn-dense"].forward(whole), 3) if seq_len <= arguments.dense_limit else None
    whole.built.clear()
    mask = slash_mask(seq_len, arguments.density, 0, heads=heads, seed=arguments.seed).to("cuda")
    problem = Problem(*tensors, mask=mask)
    times, density = measure(SPARSE["ours-triton"], problem, arguments.repeats), density_of(mask)
    beside = {"forward_ms": times["forward"], "backward_ms": times["backward"], "attention_density": density}
    attention = times["forward"] + times["backward"]
    print(f"{seq_len:7} attention at density {density:.4f}: {attention:.3f} ms", flush=True)
    problem.built.clear()
    gc.collect()
    shard = ShardTensors(
        q=problem.q, k=problem.k, positions=problem.positions, seq_len_tokens=seq_len, block_size=128,
        granularity_tokens=128,
    )  # fmt: skip
    rows = []
    for selector in selectors_of(shard, columns=arguments.columns, density=arguments.density):
        name = selector.name
        if name not in arguments.selectors:
            continue
        chosen = selector.choose(shard, scale=problem.scale)
        took = time_ms(lambda one=selector: one.choose(shard, scale=problem.scale), arguments.repeats)
        index = time_ms(lambda chosen=chosen: index_of(chosen, seq_len), arguments.repeats)
        row = {
            "selector": name,
            "seq_len": seq_len,
            "time_ms": took,
            "index_ms": index,
            "index_bytes": index_of(chosen, seq_len),
            "share_of_attention": (took + index) / attention,
            "density": density_of(chosen),
            "columns": chosen.column_capacity,
            "heads": heads,
            "kv_heads": kv_heads,
            "head_dim": arguments.head_dim,
            "seed": arguments.seed,
            **beside,
        }
        if isinstance(selector, XAttention):
            flops = 1.0 * seq_len * seq_len * arguments.head_dim * heads / selector.stride
            row |= {"stride": selector.stride, "tflops": flops / took / 1e9}
            row |= {"dense_forward_ms": dense, "floor_ms": dense / (2 * selector.stride)} if dense else {}
        rows.append(row)
        floor = f", floor {row['floor_ms']:.3f} ms" if "floor_ms" in row else ""
        print(
            f"{seq_len:7} {name:14} choice {took:8.3f} ms, index {index:6.3f} ms, {row['index_bytes'] / 1e6:7.2f} MB: "
            f"{100 * row['share_of_attention']:5.2f} % of forward + backward (density {row['density']:.3f}){floor}",
            flush=True,
        )
        del chosen
        torch.cuda.empty_cache()
    return rows


def selectors_of(shard: ShardTensors, *, columns: int, density: float) -> list[Selector]:
    """All selectors as they are measured: vertical-slash at a density, the others with their own settings."""
    # A far slash touches two block diagonals; with uniform distances the density is their share of all.
    fixed = FixedVerticalSlash(columns=columns, slashes=WINDOW_SLASHES + int(density * shard.blocks / 2))
    others = [kind() for name, kind in selectors().items() if name != fixed.name]
    return [fixed, *others]


def index_of(mask: AttentionMask, tokens: int) -> int:
    """Build what the kernels need for this mask, both directions, and return its bytes."""
    return index_bytes(WholeAttention.of(mask, tokens, device=mask.active.device, backend="triton"))


def main() -> None:
    """Measure, print as it goes, write one result file."""
    names = list(selectors())
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seq-lens", type=int, nargs="+", default=[131072])
    parser.add_argument("--selectors", nargs="+", choices=names, default=names)
    parser.add_argument("--density", type=float, default=0.05)
    parser.add_argument("--columns", type=int, default=1024, help="of vertical-slash with fixed budgets")
    shared_arguments(parser)
    arguments = parser.parse_args()
    rows = [row for seq_len in arguments.seq_lens for row in run_length(arguments, seq_len)]
    print(ResultFile("choosing", folder=arguments.results, gpus=1).write(rows))


if __name__ == "__main__":
    main()
