"""FlashAttention 4 as the kernel of a dense ring, where the flash-attn-4 wheels are and the GPU is new enough.

The same two functions of the wheels that kernels/flash4/launch.py calls, dense: causal, or all keys. They take
[B, S, H, D] with any aligned strides, so what a ring holds as [B, H, S, D] is handed over as views.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...traces.errors import UnsupportedError

NAME = "dense-zigzag-flash4"
Gradients = tuple[Tensor, Tensor, Tensor]


def require_flash4(device_type: str, *, dtype: torch.dtype, head_dim: int) -> None:
    """Raise UnsupportedError, in one line, for what keeps this kernel from running, as far as no GPU must be asked."""
    if device_type != "cuda":
        raise UnsupportedError(f"{NAME!r} needs GPUs", field="attention")
    from ...kernels.flash4 import backend as flash4
    from ...kernels.flash4 import launch

    if dtype not in flash4.DTYPES:
        raise UnsupportedError(f"{NAME!r} knows bfloat16 and float16, not {dtype}", field="attention")
    if head_dim not in flash4.HEAD_DIMS:
        raise UnsupportedError(f"{NAME!r} knows heads of {flash4.HEAD_DIMS}, not of {head_dim}", field="attention")
    try:
        launch.wheels()
    except ValueError as error:
        raise UnsupportedError(f"{NAME!r}: {error}", field="attention") from error


def require_flash4_on(device: torch.device) -> None:
    """Raise UnsupportedError, in one line, unless the wheels are here and `device` is a GPU they run on."""
    require_flash4(device.type, dtype=torch.bfloat16, head_dim=128)
    from ...kernels.flash4 import backend as flash4

    capability = torch.cuda.get_device_capability(device)
    if capability not in flash4.CAPABILITIES:
        known = " or ".join(f"{major}.{minor}" for major, minor in flash4.CAPABILITIES)
        raise UnsupportedError(
            f"{NAME!r} needs compute capability {known}, {device} has {capability[0]}.{capability[1]}",
            field="attention",
        )


def flash4_forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """Return (out in q's dtype [B, H, S_q, D], lse float32 [B, H, S_q]). k and v [B, H_kv, S_k, D]: not expanded.

    causal: S_q equals S_k, row i attends columns up to i.
    """
    out, lse = torch.empty_like(q), torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    _interface()._flash_attn_fwd(
        *_bshd(q, k, v), out=out.transpose(1, 2), lse=lse, softmax_scale=scale, causal=causal, pack_gqa=False
    )
    return out, lse


def flash4_backward(rows: list[Tensor], k: Tensor, v: Tensor, causal: bool, scale: float) -> Gradients:
    """Return (dq [B, H, S_q, D], dk and dv [B, H_kv, S_k, D]) in q's dtype.

    rows: grad_out, q, out [B, H, S_q, D] and lse float32 [B, H, S_q], the last two merged over all keys.
    """
    grad_out, q, out, lse = rows
    given = _bshd(q, k, v, out, grad_out)
    grads = _interface()._flash_attn_bwd(*given, lse, softmax_scale=scale, causal=causal)
    grad_q, grad_k, grad_v = _bshd(*grads[:3])
    return grad_q, grad_k, grad_v


def _bshd(*tensors: Tensor) -> tuple[Tensor, ...]:
    """[B, H, S, D] as [B, S, H, D], or back: views."""
    return tuple(tensor.transpose(1, 2) for tensor in tensors)


def _interface() -> Any:
    from ...kernels.flash4.launch import wheels

    return wheels()[0]
