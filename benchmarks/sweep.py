"""Sweep the Triton kernels' launch settings on this GPU and print the time of each: how kernels/tuning.py was found."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch

from ..kernels import launching, tuning
from ..kernels import triton_backend as backend
from ..kernels.tuning import Launch
from ..traces.files import write_json
from .masks import forward_flops, slash_mask


def launches(settings: str, *, tma: bool) -> list[Launch]:
    """Launches from text such as "128x64x8x2 128x64x8x2x128" (M x N x warps x stages [x registers])."""
    return [
        Launch(m=m, n=n, warps=w, stages=s, tma=tma, registers=rest[0] if rest else 0)
        for m, n, w, s, *rest in (map(int, setting.split("x")) for setting in settings.split())
    ]


DEFAULTS = {
    tuning.FORWARD: "128x64x8x2 128x64x8x3 128x128x8x2 64x64x4x2 64x64x4x3 64x128x4x2 128x64x4x2",
    tuning.GRAD_Q: "64x128x4x1 64x128x4x2 64x64x4x1 64x64x4x2 128x64x8x1 128x64x8x2 128x128x8x1",
    tuning.GRAD_KV: "64x64x4x1 64x64x4x2 64x64x4x3 64x128x8x1 64x128x8x2 64x64x8x2 32x64x4x2 128x64x8x1",
    tuning.COLUMN_FORWARD: "128x64x8x2x128 128x64x8x2 64x64x4x2 64x64x4x3",
    tuning.COLUMN_GRAD_Q: "64x64x4x1 64x64x4x2",
    tuning.FUSED_FORWARD: "128x64x8x2x128 128x64x8x2 64x64x4x2",
    tuning.FUSED_GRAD_Q: "64x64x4x2",
    tuning.COLUMN_GRAD_KV: "64x64x4x1 64x64x4x2 64x64x8x2 32x64x4x2",
}
MATMULS = {
    tuning.FORWARD: 2,
    tuning.GRAD_Q: 3,
    tuning.GRAD_KV: 4,
    tuning.COLUMN_FORWARD: 2,
    tuning.COLUMN_GRAD_Q: 3,
    tuning.COLUMN_GRAD_KV: 4,
    tuning.FUSED_FORWARD: 2,
    tuning.FUSED_GRAD_Q: 3,
}


class Work:
    """Tensors of one problem, and one callable per kernel."""

    def __init__(
        self, seq_len: int, density: float, *, heads: int, kv_heads: int, head_dim: int, block: int, dtype: torch.dtype
    ) -> None:
        generator = torch.Generator("cuda").manual_seed(0)
        shape = (1, seq_len, heads, head_dim)
        kv_shape = (1, seq_len, kv_heads, head_dim)
        self.mask = slash_mask(seq_len, density, 1024, heads=heads, block=block).to("cuda")
        self.q, self.grad_out = (torch.randn(shape, device="cuda", dtype=dtype, generator=generator) for _ in range(2))
        self.k, self.v = (torch.randn(kv_shape, device="cuda", dtype=dtype, generator=generator) for _ in range(2))
        column_shape = (1, heads, 1024, head_dim)
        self.column_k, self.column_v = (
            torch.randn(column_shape, device="cuda", dtype=dtype, generator=generator) for _ in range(2)
        )
        self.positions = positions = torch.arange(seq_len, device="cuda")
        self.index = backend.block_index(self.mask, positions, positions)
        self.columns = backend.column_index(self.mask, positions)
        self.scale = head_dim**-0.5
        self.out, self.lse = backend.block_forward(
            self.q, self.k, self.v, self.index, scale=self.scale, out_dtype=dtype
        )
        delta = (self.grad_out.float() * self.out.float()).sum(-1).transpose(1, 2).contiguous()
        self.values = launching.row_values_of(self.lse, delta, self.index, self.scale)
        self.grads = [torch.empty_like(x) for x in (self.q, self.k, self.v)]
        self.grad_q = torch.zeros(shape, device="cuda")
        self.partial = self.out.float(), self.lse.clone()
        block_flops = forward_flops(slash_mask(seq_len, density, 0, heads=heads, block=block), head_dim)
        column_flops = forward_flops(self.mask, head_dim) - block_flops
        parts = {"column": column_flops, "fused": block_flops + column_flops}
        self.flops = {k: parts.get(k.split("_")[0], block_flops) / 2 * n for k, n in MATMULS.items()}

    def call(self, kernel: str) -> Callable[[], object]:
        """The launch of one kernel with the settings in force."""
        q, k, v, do, s, values = self.q, self.k, self.v, self.grad_out, self.scale, self.values
        columns = (self.column_k, self.column_v, self.columns)
        into = self.grads[0]
        return {
            tuning.FORWARD: lambda: backend.block_forward(q, k, v, self.index, scale=s, out_dtype=q.dtype),
            tuning.FUSED_FORWARD: lambda: backend.block_forward(
                q, k, v, self.index, scale=s, out_dtype=q.dtype, columns=columns
            ),
            tuning.COLUMN_FORWARD: lambda: backend.column_forward(q, *columns, scale=s, into=self.partial),
            tuning.GRAD_Q: lambda: backend.grad_query(do, q, k, v, values, self.index, None, s, into, add=False),
            tuning.FUSED_GRAD_Q: lambda: backend.grad_query(
                do, q, k, v, values, self.index, columns, s, into, add=False
            ),
            tuning.COLUMN_GRAD_Q: lambda: backend.grad_query(
                do, q, None, None, values, None, columns, s, self.grad_q, add=True
            ),
            tuning.GRAD_KV: lambda: backend.grad_key_value(
                do, q, k, v, values, self.index, s, *self.grads[1:], add=False
            ),
            tuning.COLUMN_GRAD_KV: lambda: backend.grad_columns(do, q, columns, values, s),
        }[kernel]


def time_ms(call: Callable[[], object], *, repeats: int = 7, warmups: int = 2) -> float:
    """Median milliseconds of a call, by CUDA events."""
    for _ in range(warmups):
        call()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for start, end in events:
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return sorted(start.elapsed_time(end) for start, end in events)[repeats // 2]


def main() -> None:
    """Compile in parallel processes on a small problem first, then time every setting alone."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seq-len", type=int, default=131072)
    parser.add_argument("--densities", type=float, nargs="+", default=[0.05])
    parser.add_argument("--heads", type=int, nargs=2, default=[16, 2])
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--block", type=int, default=128)
    parser.add_argument("--settings", type=json.loads, default=DEFAULTS, help="JSON: kernel -> 'MxNxWARPSxSTAGES ...'")
    parser.add_argument("--pointers", action="store_true", help="pointer loads instead of tensor descriptors")
    parser.add_argument("--write", type=Path, help="file for the fastest launch of each kernel, as JSON")
    parser.add_argument("--workers", type=int, default=12)
    parser.add_argument("--worker", type=int, default=None, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    jobs = [
        (kernel, launch)
        for kernel, text in arguments.settings.items()
        for launch in launches(text, tma=not arguments.pointers)
        if max(launch.m, launch.n) <= arguments.block
    ]
    best: dict[str, tuple[float, Launch]] = {}
    if arguments.worker is None:
        command = [sys.executable, "-m", __spec__.name, *sys.argv[1:]]
        others = [
            subprocess.Popen([*command, "--worker", str(i)], stderr=subprocess.DEVNULL)
            for i in range(min(arguments.workers, len(jobs)))
        ]
        for other in others:
            other.wait()
    else:
        arguments.seq_len, arguments.densities = 16384, [0.1]
        jobs = jobs[arguments.worker :: arguments.workers]
    heads, kv_heads = arguments.heads
    for density in arguments.densities:
        work = Work(
            arguments.seq_len,
            density,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=arguments.head_dim,
            block=arguments.block,
            dtype=torch.bfloat16,
        )
        for kernel, launch in jobs:
            tuning.OVERRIDES[kernel] = launch
            try:
                took = time_ms(work.call(kernel), repeats=1 if arguments.worker is not None else 7)
            except Exception as error:
                print(f"{density} {kernel} {launch}: {type(error).__name__} {str(error)[-100:]!r}", flush=True)
                continue
            finally:
                tuning.OVERRIDES.pop(kernel)
            if arguments.worker is None:
                rate = work.flops[kernel] / took / 1e9
                best[kernel] = min(best.get(kernel, (took, launch)), (took, launch), key=lambda pair: pair[0])
                tiles = f"{launch.m}x{launch.n}x{launch.warps}x{launch.stages}x{launch.registers}"
                print(
                    f"{density:.2f} {kernel:14} {tiles:16} {'tma' if launch.tma else 'ptr'} {took:8.3f} ms "
                    f"{rate:6.0f} TFLOP/s",
                    flush=True,
                )
    if arguments.write and arguments.worker is None:
        write_json(arguments.write, {kernel: asdict(launch) for kernel, (_, launch) in best.items()})


if __name__ == "__main__":
    main()
