"""The flash4 backend: the block part by the flash-attn-4 wheels, the column part by the Triton kernels.

Contracts are those of api.py and of Backend. Optional: `pip install --pre flash-attn-4`; the wheels are
imported at first use. Compute capabilities 9.0 and 10.0 (of which 9.0 was at hand), mask blocks of 128 tokens, head
dims 64 and 128, float16 and bfloat16; anything else raises ValueError.

A partial is rounded to the inputs' dtype before it is merged in float32, and so are a task's gradients before they are
added. Repeatability: out, lse, and dK and dV of KV heads whose query heads one program walks (fold.py) repeat bit for
bit; dQ, and other dK and dV, are added up by atomics in float32 in an order that varies from run to run (a few ulps in
16 bits).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..backend import register
from ..index.columns import ColumnTask
from ..mask import AttentionMask
from ..merge import accumulator_dtype
from ..triton import launching
from ..triton.backend import Triton
from ..triton.partials import check_partial
from ..values import BackwardQueries, Columns, Gradients, Keys, Partial, Queries, QueryGradient
from . import launch
from .index import Flash4Task, flash4_task
from .launch import BLOCK_SIZE, attend, key_gradients
from .merge import merge_part

HEAD_DIMS = (64, 128)
DTYPES = (torch.float16, torch.bfloat16)
CAPABILITIES = ((9, 0), (10, 0))


class Flash4(Triton):
    """flash-attn-4's block-sparse kernels over keys; all else is the Triton backend's."""

    name = "flash4"

    def block_index(self, mask: AttentionMask, q_positions: Tensor, k_positions: Tensor) -> Flash4Task:
        """See Backend. Raises ValueError where the wheels, the GPU or the block size are missing."""
        _check_device(mask.active.device, mask.block_size)
        if mask.windows is not None:
            raise ValueError(f"mask.windows: {max(mask.windows)} tokens; the flash4 backend knows whole blocks alone")
        return flash4_task(mask, q_positions, k_positions)

    def column_index(self, mask: AttentionMask, q_positions: Tensor) -> ColumnTask:
        """See Backend: the Triton backend's. Raises ValueError as block_index does."""
        _check_device(mask.active.device, mask.block_size)
        return super().column_index(mask, q_positions)

    def forward(
        self, queries: Queries, keys: Keys | None, columns: Columns | None, *, earlier: Partial | None, final: bool
    ) -> Partial:
        """See Backend. `earlier` is merged in place where it has the dtype wanted; columns by a Triton launch before.

        A fresh out over keys alone is in q's dtype, to which the wheels round.
        """
        if keys is None:
            return super().forward(queries, None, columns, earlier=earlier, final=final)
        q, index = queries.q, keys.index.data
        _check_tensors(q, keys.k, index)
        if queries.softcap is not None:
            raise ValueError(f"softcap: {queries.softcap}; the flash4 backend has none")
        if earlier is not None:
            check_partial(*earlier, q)
        if columns is not None:
            earlier = super().forward(queries, None, columns, earlier=earlier, final=False)
        (batch, tokens, heads, _), valid = q.shape, index.task.q_valid_tokens
        rows = tokens if earlier is None else valid
        out = torch.empty(batch, rows, *q.shape[2:], dtype=q.dtype, device=q.device)
        lse = torch.empty(batch, heads, rows, dtype=torch.float32, device=q.device)
        out[:, valid:], lse[:, :, valid:] = 0, -torch.inf
        attend(queries, keys, out[:, :valid], lse[:, :, :valid])
        if earlier is None:
            return out, lse
        out_dtype = q.dtype if final else accumulator_dtype(q.dtype)
        return merge_part((out, lse), earlier, tokens=tokens, out_dtype=out_dtype)

    def backward(self, queries: BackwardQueries, keys: Keys | None, columns: Columns | None, into: Gradients) -> None:
        """See Backend. Not bitwise repeatable: see the module. Columns first, by Triton launches."""
        query = into.query
        if columns is not None:
            last = keys is None
            of_columns = query if last else QueryGradient(total=query.total, add=query.add)
            super().backward(queries, None, columns, Gradients(query=of_columns, columns=into.columns))
            query = QueryGradient(total=query.total, add=True, final=query.final)
        if keys is not None and into.keys is not None:
            _check_tensors(queries.q, keys.k, keys.index.data)
            key_gradients(queries, keys, query, into.keys)

    def takes(self, device: torch.device, *, dtype: torch.dtype, head_dim: int, block_size: int) -> bool:
        """See Backend."""
        if dtype not in DTYPES or head_dim not in HEAD_DIMS:
            return False
        try:
            _check_device(device, block_size)
        except ValueError:
            return False
        return True


register(Flash4())


def _check_device(device: torch.device, block_size: int) -> None:
    """Raise ValueError for what keeps this backend from running a mask here."""
    if block_size != BLOCK_SIZE:
        raise ValueError(f"mask.block_size: {block_size} is not {BLOCK_SIZE} (flash4 backend)")
    launch.wheels()
    if device.type != "cuda":
        raise ValueError(f"mask.active: on {device}, the flash4 backend needs a CUDA device")
    capability = torch.cuda.get_device_capability(device)
    if capability not in CAPABILITIES:
        known = ", ".join(f"{major}.{minor}" for major, minor in CAPABILITIES)
        raise ValueError(
            f"backend flash4: compute capability {capability[0]}.{capability[1]} of {device} is not {known}"
        )


def _check_tensors(q: Tensor, k: Tensor, index: Flash4Task) -> None:
    if q.dtype not in DTYPES:
        raise ValueError(f"q: dtype {q.dtype} is neither float16 nor bfloat16 (flash4 backend)")
    if q.shape[3] not in HEAD_DIMS:
        raise ValueError(f"q: head dim {q.shape[3]} is not one of {HEAD_DIMS} (flash4 backend)")
    launching.check_query(q, index.task)
    launching.check_keys(k, index.task)
