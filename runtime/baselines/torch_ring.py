"""The dense baseline that PyTorch brings: its own context parallelism over scaled_dot_product_attention (GPUs only).

PyTorch's ring does not know grouped queries, so K/V heads are repeated. Its forward builds an autograd graph of its
own, which is kept until backward: like every implementation here it runs forward once, whatever is recomputed.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.device_mesh import DeviceMesh

from ...traces.errors import UnsupportedError
from ..attention.recompute import computed_once
from ..comm.mesh import Mesh
from ..comm.reuse import common_group
from ..pattern.form import PLAIN, AttentionForm


class TorchContextParallel:
    """Dense causal attention by torch's context_parallel; shards must be placed zigzag. Making it is collective.

    Raises UnsupportedError on CPUs, for which PyTorch has no ring.
    """

    def __init__(self, mesh: Mesh) -> None:
        if mesh.device.type != "cuda":
            raise UnsupportedError("'torch-context-parallel' needs GPUs", field="attention")
        self.mesh = mesh
        group: Any = common_group(mesh, "torch-context-parallel")
        self._device_mesh = DeviceMesh.from_group(group, "cuda", mesh_dim_names=("context",))

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Any = None, *, scale: float | None = None,
        layer: int | None = None, form: AttentionForm = PLAIN,
    ) -> Tensor:  # fmt: skip
        """Return out [B, S, H, D]. q [B, S, H, D], k and v [B, S, H_kv, D]; mask and layer are ignored: it is dense."""
        form.require_plain(q.shape[1] * self.mesh.world_size, about="torch's context parallelism")
        out = _TorchRing.apply(q, k, v, self, scale)
        assert isinstance(out, Tensor)
        return out

    def close(self) -> None:
        """Nothing is held."""

    def ring(self) -> Any:
        """Return the context in which torch's attention is a ring. It wants a buffer to shard: nobody reads this."""
        from torch.distributed.tensor.experimental import context_parallel

        buffer = torch.zeros(2 * self.mesh.world_size, device=self.mesh.device)
        return context_parallel(self._device_mesh, buffers=[buffer], buffer_seq_dims=[0], no_restore_buffers={buffer})

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
        """Return out [B, H, S, D] with its graph."""
        from torch.nn.attention import SDPBackend, sdpa_kernel

        group = q.shape[1] // k.shape[1]
        keys, values = (x.repeat_interleave(group, dim=1) for x in (k, v))
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION), self.ring():
            return F.scaled_dot_product_attention(q, keys, values, is_causal=True, scale=scale)


class _TorchRing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, ring: TorchContextParallel, scale: float | None) -> Tensor:
        """Return out, and keep torch's own graph of it; a checkpointed layer's recomputation takes what was kept."""

        def compute() -> tuple[Tensor]:
            leaves = [x.detach().transpose(1, 2).contiguous().requires_grad_() for x in (q, k, v)]
            # The inner graph keeps its own tensors: an activation checkpoint around this layer must not see them, since
            # nothing of it is computed again. Detached, so that a saved output does not hold its own graph.
            with torch.enable_grad(), saved_tensors_hooks(torch.Tensor.detach, lambda tensor: tensor):
                out = ring.forward(leaves[0], leaves[1], leaves[2], scale)
            ctx.graph = out, leaves, ring
            return (out.detach().transpose(1, 2).contiguous(),)

        return computed_once(compute, q.device)[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        out, leaves, ring = ctx.graph
        ctx.graph = None
        with ring.ring():
            gradients = torch.autograd.grad(out, leaves, grads[0].transpose(1, 2).contiguous())
        return *(x.transpose(1, 2).contiguous() for x in gradients), None, None
