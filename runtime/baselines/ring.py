"""The dense baseline: a zigzag ring over fused attention kernels (PyTorch's cuDNN, CPU flash; FA4).

Rank r owns chunks r and 2W - 1 - r of 2W, so that all ranks have the same causal work. K and V travel around the ring;
partial results merge by log-sum-exp; in backward the kernels are handed the merged out and log-sum-exp, which makes
every block's gradient exact, and dK and dV travel along with their K and V until they are home.

Shape legend: B batch, S tokens of this rank's shard, H query heads, H_kv K/V heads, D head dim, W ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ...kernels.api import merge
from ...traces.errors import UnsupportedError
from ..attention.recompute import computed_once
from ..comm.channels import Waiting
from ..comm.mesh import Mesh
from ..comm.reuse import common_group
from ..pattern.form import PLAIN, AttentionForm
from .flash4 import Gradients, flash4_backward, flash4_forward, require_flash4_on

Pair = tuple[Tensor, Tensor]  # K and V, or their gradients; a partial result: out [B, H, S, D], lse [B, H, S] float
aten = torch.ops.aten


class ZigzagAttention:
    """Dense causal attention over the ranks of a mesh whose shards are placed zigzag. Making it is collective.

    kernel: a name of KERNELS; default: cuDNN's on GPUs. waiting: made around every wait for other ranks, to measure it.
    """

    def __init__(self, mesh: Mesh, *, kernel: str | None = None, waiting: Waiting = nullcontext) -> None:
        self.mesh, self._waiting = mesh, waiting
        self.kernel = kernel or ("cudnn" if mesh.device.type == "cuda" else "cpu")
        if self.kernel == "flash4":
            require_flash4_on(mesh.device)
        if (self.kernel == "cpu") != (mesh.device.type == "cpu") or self.kernel not in KERNELS:
            raise UnsupportedError(f"{self.kernel!r} does not run on {mesh.device.type}", field="kernel")
        self.group = common_group(mesh, "zigzag") if mesh.world_size > 1 else None

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Any = None, *, scale: float | None = None,
        layer: int | None = None, form: AttentionForm = PLAIN,
    ) -> Tensor:  # fmt: skip
        """Return out [B, S, H, D]. q [B, S, H, D], k and v [B, S, H_kv, D]; mask and layer are ignored: it is dense."""
        form.require_plain(q.shape[1] * self.mesh.world_size, about="the zigzag ring")
        if q.shape[1] % 2:
            raise UnsupportedError(f"{q.shape[1]} tokens are not two chunks", field="q")
        out = _Zigzag.apply(q, k, v, self, q.shape[-1] ** -0.5 if scale is None else scale)
        assert isinstance(out, Tensor)
        return out

    def close(self) -> None:
        """Nothing is held."""

    def rotate(self, tensors: Pair) -> Callable[[], Pair]:
        """Start to send tensors to the next rank; return a function that waits for those of the previous one."""
        rank, world = self.mesh.rank, self.mesh.world_size
        following, previous = self.mesh.process((rank + 1) % world), self.mesh.process((rank - 1) % world)
        landed = torch.empty_like(tensors[0]), torch.empty_like(tensors[1])
        operations = [dist.P2POp(dist.isend, tensor, following, self.group) for tensor in tensors]
        operations += [dist.P2POp(dist.irecv, tensor, previous, self.group) for tensor in landed]
        works = dist.batch_isend_irecv(operations)

        def wait() -> Pair:
            with self._waiting():
                for work in works:
                    work.wait()
            return landed

        return wait


class _Zigzag(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, ring: ZigzagAttention, scale: float) -> Tensor:
        q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))  # [B, H, S, D], as the kernels want it
        ctx.ring, ctx.scale = ring, scale
        out, lse = computed_once(lambda: _forward(ring, q, (k, v), scale), q.device)
        ctx.save_for_backward(q, k, v, out, lse)
        return out.transpose(1, 2).contiguous()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        grad_out = grads[0].transpose(1, 2).contiguous()
        gradients = _backward(ctx.ring, (grad_out, q, out, lse), (k, v), ctx.scale)
        return *(x.to(q.dtype).transpose(1, 2).contiguous() for x in gradients), None, None


def _forward(ring: ZigzagAttention, q: Tensor, kv: Pair, scale: float) -> Pair:
    kernel = KERNELS[ring.kernel]
    rank, world = ring.mesh.rank, ring.mesh.world_size
    wide = torch.promote_types(q.dtype, torch.float32)
    total_out = total_lse = None
    for step in range(world):
        wait = ring.rotate(kv) if step + 1 < world else None
        rows, keys, causal = _work(rank, (rank - step) % world, q.shape[2])
        k, v = (kernel.keys(part[:, :, keys], q.shape[1]) for part in kv)
        out, lse = kernel.attend(q[:, :, rows].contiguous(), k, v, causal, scale)
        out = out.to(wide)
        if total_out is None or total_lse is None:
            total_out, total_lse = out, lse
        else:
            so_far = total_out[:, :, rows].transpose(1, 2), total_lse[:, :, rows]
            merged, total_lse[:, :, rows] = merge(*so_far, out.transpose(1, 2), lse)
            total_out[:, :, rows] = merged.transpose(1, 2)
        kv = kv if wait is None else wait()
    assert total_out is not None and total_lse is not None
    return total_out.to(q.dtype), total_lse


def _backward(ring: ZigzagAttention, own: tuple[Tensor, ...], kv: Pair, scale: float) -> Gradients:
    """own: grad_out, q, out, lse, as the kernels want their rows."""
    kernel, q = KERNELS[ring.kernel], own[1]
    rank, world = ring.mesh.rank, ring.mesh.world_size
    wide = torch.promote_types(q.dtype, torch.float32)
    grad_q = torch.zeros_like(q, dtype=wide)
    arriving: Callable[[], Pair] | None = None
    for step in range(world):
        wait = ring.rotate(kv) if step + 1 < world else None
        rows, keys, causal = _work(rank, (rank - step) % world, q.shape[2])
        k, v = (kernel.keys(part[:, :, keys], q.shape[1]) for part in kv)
        rows_of = [x[:, :, rows].contiguous() for x in own]
        part_q, part_k, part_v = kernel.differentiate(rows_of, k, v, causal, scale)
        grad_q[:, :, rows] += part_q
        grad_kv = arriving() if arriving else (torch.zeros_like(kv[0], dtype=wide), torch.zeros_like(kv[1], dtype=wide))
        for into, part in zip(grad_kv, (part_k, part_v), strict=True):
            into[:, :, keys] += part.to(wide).unflatten(1, (into.shape[1], -1)).sum(2)
        kv = kv if wait is None else wait()
        arriving = ring.rotate(grad_kv) if world > 1 else lambda done=grad_kv: done
    assert arriving is not None
    return grad_q, *arriving()


def _work(rank: int, source: int, tokens: int) -> tuple[slice, slice, bool]:
    """Return (query rows, key rows, whether causal) of the own shard against that of `source`.

    Later chunk numbers are later tokens: of an earlier rank's shard only the first chunk is in the past, of a later
    rank's both chunks are, but only for the second half of the own queries.
    """
    everything, half = slice(0, tokens), tokens // 2
    if source == rank:
        return everything, everything, True
    if source < rank:
        return everything, slice(0, half), False
    return slice(half, tokens), everything, False


def _cudnn(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> Pair:
    out, lse, *_ = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, causal, False, scale=scale)
    return out, lse.reshape(q.shape[:3]).float()


def _cudnn_backward(rows: list[Tensor], k: Tensor, v: Tensor, causal: bool, scale: float) -> Gradients:
    grad_out, q, out, lse = rows
    unused = torch.zeros((), dtype=torch.int64, device=q.device)  # the seed and offset of a dropout that there is not
    return aten._scaled_dot_product_cudnn_attention_backward(
        grad_out, q, k, v, out, lse[..., None], unused, unused, None, None, None, q.shape[2], k.shape[2], 0.0, causal,
        scale=scale,
    )  # fmt: skip


def _cpu(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> Pair:
    return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)


def _cpu_backward(rows: list[Tensor], k: Tensor, v: Tensor, causal: bool, scale: float) -> Gradients:
    grad_out, q, out, lse = rows
    return aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad_out, q, k, v, out, lse, 0.0, causal, scale=scale
    )


class Kernel(NamedTuple):
    """attend and differentiate one block of work; grouped: whether they know grouped queries."""

    attend: Callable[..., Pair]
    differentiate: Callable[..., Gradients]
    grouped: bool = False

    def keys(self, part: Tensor, heads: int) -> Tensor:
        """Return K or V [B, H_kv, S, D] as the kernel wants it: its heads repeated for query heads, or as it is."""
        return part if self.grouped else part.repeat_interleave(heads // part.shape[1], dim=1)


KERNELS = {
    "cudnn": Kernel(_cudnn, _cudnn_backward),
    "flash4": Kernel(flash4_forward, flash4_backward, grouped=True),
    "cpu": Kernel(_cpu, _cpu_backward),
}
