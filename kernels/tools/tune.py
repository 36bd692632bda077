"""Finding launch settings on the GPU at hand: every candidate of every kernel timed on one seeded problem.

`sparsering doctor --kernels --tune` runs it; `tuning.py` holds what it found on the GPUs that were at hand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from typing import Any

import torch

from .. import api
from ..mask import AttentionMask
from ..triton import gradients, launching, tuning
from ..triton.tuning import Launch

SLASH_SHARE = 0.3  # of the active diagonals: the local window
COLUMNS = 1024
WARM_TOKENS, WARM_DENSITY = 8192, 0.1
WORKERS = 8  # processes that compile
# M x N x warps x stages [x registers]. Pipelines get deeper where loads are asynchronous copies (sm_80).
CANDIDATES = {
    tuning.FORWARD: "128x64x8x2x128 128x64x8x2 128x64x4x2 128x64x4x3 64x64x4x2 64x64x4x3 128x128x8x2 128x32x4x3",
    tuning.GRAD_Q: "64x64x4x1 64x64x4x2 64x128x4x1 64x128x4x2 128x64x8x1 128x64x8x2 64x64x8x2 64x32x4x3",
    tuning.GRAD_KV: "64x64x4x1 64x64x4x2 64x64x4x3 64x128x8x1 64x128x8x2 64x64x8x2 32x64x4x2 128x64x8x1 64x32x4x2",
    tuning.FUSED_FORWARD: "128x64x8x2x128 128x64x8x2 128x32x8x2 64x64x4x2 64x64x4x3 128x32x4x3",
    tuning.FUSED_GRAD_Q: "64x64x4x1 64x64x4x2 64x64x8x2 64x32x4x3",
    tuning.COLUMN_FORWARD: "128x64x8x2x128 128x64x8x2 128x32x8x2 64x64x4x2 64x64x4x3",
    tuning.COLUMN_GRAD_Q: "64x64x4x1 64x64x4x2 64x64x8x2 64x32x4x3",
    tuning.COLUMN_GRAD_KV: "64x64x4x1 64x64x4x2 64x64x8x2 32x64x4x2",
}
# Matmuls of one step, for rates: QK and PV; QK, dO V and dS K; all four of dK and dV.
MATMULS = {
    tuning.FORWARD: 2, tuning.GRAD_Q: 3, tuning.GRAD_KV: 4, tuning.COLUMN_FORWARD: 2, tuning.COLUMN_GRAD_Q: 3,
    tuning.COLUMN_GRAD_KV: 4, tuning.FUSED_FORWARD: 2, tuning.FUSED_GRAD_Q: 3,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The problem that is tuned for. density: share of active block pairs; tokens in one sequence, batch 1."""

    seq_len_tokens: int = 131072
    density: float = 0.05
    heads: int = 16
    kv_heads: int = 2
    head_dim: int = 128
    block_size: int = 128
    dtype: torch.dtype = torch.bfloat16

    def __post_init__(self) -> None:
        if self.seq_len_tokens < 1 or self.seq_len_tokens % self.block_size:
            raise ValueError(f"seq_len_tokens: {self.seq_len_tokens} is no multiple of {self.block_size}")
        if self.block_size not in launching.BLOCK_SIZES or self.head_dim not in launching.HEAD_DIMS:
            raise ValueError(f"head_dim, block_size: {self.head_dim}, {self.block_size} are not what the kernels have")
        if self.kv_heads < 1 or self.heads % self.kv_heads:
            raise ValueError(f"heads, kv_heads: {self.heads} is no multiple of {self.kv_heads}")
        if not 0 < self.density <= 1:
            raise ValueError(f"density: {self.density} is outside ]0, 1]")


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One launch of one kernel: its median time and rate, or why it did not run."""

    kernel: str
    launch: Launch
    time_ms: float | None
    tflops: float | None
    error: str | None = None


def toeplitz_mask(shape: Shape, *, columns: int) -> AttentionMask:
    """A seeded mask of about the shape's density on the GPU: a local window and scattered pairs of diagonals."""
    generator = torch.Generator().manual_seed(0)
    blocks = shape.seq_len_tokens // shape.block_size
    local = max(1, int(blocks * shape.density * SLASH_SHARE))
    far = int(blocks * shape.density * (1 - SLASH_SHARE) / 2)
    active = torch.zeros(shape.heads, blocks + 1, dtype=torch.bool)
    active[:, :local] = True
    chosen = torch.empty(shape.heads, columns, dtype=torch.int32)
    for head in range(shape.heads):
        starts = torch.randperm(blocks, generator=generator)[:far]
        active[head, starts] = active[head, starts + 1] = True
        chosen[head] = torch.sort(torch.randperm(shape.seq_len_tokens, generator=generator)[:columns]).values.int()
    active = active[:, :blocks].contiguous()
    mask = AttentionMask(
        seq_len_tokens=shape.seq_len_tokens, block_size=shape.block_size, active=active, columns=chosen
    )
    return mask.to("cuda")


class Work:
    """Tensors of one problem, and one callable per kernel."""

    def __init__(self, shape: Shape) -> None:
        generator = torch.Generator("cuda").manual_seed(0)

        def draw(*size: int) -> torch.Tensor:
            return torch.randn(1, *size, shape.head_dim, device="cuda", dtype=shape.dtype, generator=generator)

        tokens = shape.seq_len_tokens
        self.q, self.grad_out = draw(tokens, shape.heads), draw(tokens, shape.heads)
        self.k, self.v = draw(tokens, shape.kv_heads), draw(tokens, shape.kv_heads)
        mask = toeplitz_mask(shape, columns=min(COLUMNS, tokens // 2))
        assert mask.columns is not None
        positions = torch.arange(tokens, device="cuda")
        index = api.block_index(mask, positions, positions, backend="triton")
        of_columns = api.column_index(mask, positions, backend="triton")
        column_k, column_v = api.gather_columns(self.k, self.v, of_columns)
        self.keys = api.Keys(k=self.k, v=self.v, index=index)
        self.columns = api.Columns(k=column_k, v=column_v, index=of_columns)
        given: dict[str, Any] = {"q": self.q, "scale": shape.head_dim**-0.5}
        out, lse = api.forward(api.Queries(**given), self.keys, final=True)
        delta = (self.grad_out.float() * out.float()).sum(-1).transpose(1, 2).contiguous()
        self.queries = api.BackwardQueries(**given, grad_out=self.grad_out, lse=lse, delta=delta)
        self.values = gradients.row_values_of(self.queries, index.data)
        self.grads = [torch.empty_like(x) for x in (self.q, self.k, self.v)]
        self.grad_q = torch.zeros(self.q.shape, device="cuda")
        self.partial = out.float(), lse.clone()
        weights = mask.blocks - torch.arange(mask.blocks, device="cuda")
        blocks = 2.0 * shape.head_dim * shape.block_size**2 * float((mask.active * weights).sum())
        columns = 2.0 * shape.head_dim * float((tokens - mask.columns.double()).sum())
        parts = {"column": columns, "fused": blocks + columns}
        self.flops = {k: parts.get(k.split("_")[0], blocks) * n for k, n in MATMULS.items()}

    def call(self, kernel: str) -> Callable[[], object]:
        """The launch of one kernel with the settings in force."""
        queries, keys, columns, values = self.queries, self.keys, self.columns, self.values
        into = api.QueryGradient(total=self.grad_q, add=False, final=self.grads[0])
        added = api.QueryGradient(total=self.grad_q, add=True)
        of_keys = api.KeyGradients(k=self.grads[1], v=self.grads[2], add=False)
        return {
            tuning.FORWARD: lambda: api.forward(queries, keys, final=True),
            tuning.FUSED_FORWARD: lambda: api.forward(queries, keys, columns, final=True),
            tuning.COLUMN_FORWARD: lambda: api.forward(queries, None, columns, earlier=self.partial),
            tuning.GRAD_Q: lambda: gradients.grad_query(queries, keys, None, values, into),
            tuning.FUSED_GRAD_Q: lambda: gradients.grad_query(queries, keys, columns, values, into),
            tuning.COLUMN_GRAD_Q: lambda: gradients.grad_query(queries, None, columns, values, added),
            tuning.GRAD_KV: lambda: gradients.grad_key_value(queries, keys, values, of_keys),
            tuning.COLUMN_GRAD_KV: lambda: gradients.grad_columns(queries, columns, values),
        }[kernel]


def candidates(shape: Shape, *, tma: bool) -> list[tuple[str, Launch]]:
    """(kernel, launch) of every candidate that fits the shape's blocks; registers are capped only with tma."""
    found = []
    for kernel, text in CANDIDATES.items():
        for setting in text.split():
            m, n, warps, stages, *rest = map(int, setting.split("x"))
            if max(m, n) <= shape.block_size:
                registers = rest[0] if rest and tma else 0
                found.append((kernel, Launch(m=m, n=n, warps=warps, stages=stages, tma=tma, registers=registers)))
    return list(dict.fromkeys(found))


def sweep(shape: Shape, jobs: list[tuple[str, Launch]]) -> Iterator[Trial]:
    """Time every launch alone, one after the other. They are compiled beforehand, in WORKERS processes."""
    with ProcessPoolExecutor(WORKERS, mp_context=get_context("spawn")) as pool:
        list(pool.map(_compile, [shape] * WORKERS, [jobs[i::WORKERS] for i in range(WORKERS)]))
    work = Work(shape)
    for kernel, launch in jobs:
        yield _trial(work, kernel, launch, repeats=9)


def best(trials: list[Trial]) -> dict[str, Launch]:
    """The fastest launch of each kernel."""
    ran = [trial for trial in trials if trial.time_ms is not None]
    kernels = dict.fromkeys(trial.kernel for trial in ran)
    fastest = {k: min((t for t in ran if t.kernel == k), key=lambda t: t.time_ms or 0.0) for k in kernels}
    return {kernel: trial.launch for kernel, trial in fastest.items()}


def launches_document(shape: Shape, launches: Mapping[str, Launch], *, capability: int) -> dict[str, Any]:
    """What a launches file holds: see tuning.use."""
    return {
        "capability": capability,
        "head_dim": shape.head_dim,
        "block_size": shape.block_size,
        "launches": {kernel: asdict(launch) for kernel, launch in launches.items()},
    }


def _compile(shape: Shape, jobs: list[tuple[str, Launch]]) -> None:
    """Compile in a process of its own by running on a short sequence; the cache on disk is what stays."""
    small = Shape(**{**vars(shape), "seq_len_tokens": WARM_TOKENS, "density": WARM_DENSITY})
    work = Work(small)
    for kernel, launch in jobs:
        _trial(work, kernel, launch, repeats=1)


def _trial(work: Work, kernel: str, launch: Launch, *, repeats: int) -> Trial:
    tuning.OVERRIDES[kernel] = launch
    try:
        took = median_ms(work.call(kernel), repeats=repeats)
    except Exception as error:  # a setting that does not fit this GPU is a result, not an end
        text = str(error).strip().splitlines()
        return Trial(kernel=kernel, launch=launch, time_ms=None, tflops=None, error=text[-1] if text else repr(error))
    finally:
        tuning.OVERRIDES.pop(kernel)
    return Trial(kernel=kernel, launch=launch, time_ms=took, tflops=work.flops[kernel] / took / 1e9)


def median_ms(call: Callable[[], object], *, repeats: int, warmups: int = 2) -> float:
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
