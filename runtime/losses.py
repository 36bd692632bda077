"""Cross-entropy straight from hidden states: the logits of a long sequence never exist at once.

Shape legend: T tokens, E hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

IGNORED_LABEL = -100
LossName = Literal["chunked", "liger"]


def linear_cross_entropy_sum(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, implementation: LossName, chunk_tokens: int = 2048
) -> Tensor:
    """Return the float32 sum over tokens of -log softmax(hidden @ weight.T)[label]; labels of -100 count nothing.

    hidden [T, E], weight [V, E], labels int64 [T]. No valid label gives 0 and zero gradients. implementation "liger"
    takes liger-kernel's fused kernels (CUDA), "chunked" plain torch, `chunk_tokens` at a time.
    """
    if implementation == "liger":
        return _liger_sum(hidden, weight, labels)
    total = _ChunkedCrossEntropy.apply(hidden, weight, labels, chunk_tokens)
    assert isinstance(total, Tensor)
    return total


def pick_implementation(wanted: str, device: torch.device) -> LossName:
    """Return what "auto" is on this device; liger-kernel where it is present and there is a GPU."""
    if wanted != "auto":
        return "liger" if wanted == "liger" else "chunked"
    return "liger" if device.type == "cuda" and liger_is_here() else "chunked"


def liger_is_here() -> bool:
    """Whether liger-kernel can be imported."""
    try:
        import liger_kernel.transformers.fused_linear_cross_entropy  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError:
        return False
    return True


def _liger_sum(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    from liger_kernel.transformers.fused_linear_cross_entropy import (  # pyright: ignore[reportMissingImports]
        LigerFusedLinearCrossEntropyLoss,
    )

    loss = LigerFusedLinearCrossEntropyLoss(ignore_index=IGNORED_LABEL, reduction="sum", accum_dtype=torch.float32)
    return loss(weight, hidden, labels).float()


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Computes the gradients along with the sum, chunk by chunk, so that no logits are kept or computed twice."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, chunk_tokens: int) -> Tensor:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        total = torch.zeros((), dtype=wide, device=hidden.device)
        grad_hidden = torch.zeros_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=wide)
        for start in range(0, hidden.shape[0], chunk_tokens):
            rows = slice(start, start + chunk_tokens)
            part, grad_logits = _chunk(hidden[rows] @ weight.T, labels[rows], wide)
            total += part
            grad_hidden[rows] = grad_logits @ weight
            grad_weight += grad_logits.T @ hidden[rows]
        ctx.save_for_backward(grad_hidden, grad_weight.to(weight.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        factor = grads[0]
        return grad_hidden * factor.to(grad_hidden.dtype), grad_weight * factor.to(grad_weight.dtype), None, None


def _chunk(logits: Tensor, labels: Tensor, wide: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the chunk's summed loss and the gradient of its logits, in the logits' type."""
    valid = labels != IGNORED_LABEL
    target = torch.where(valid, labels, 0)[:, None]
    scores = logits.to(wide)
    normalizer = torch.logsumexp(scores, dim=-1)
    chosen = scores.gather(1, target)[:, 0]
    total = torch.where(valid, normalizer - chosen, 0).sum()
    gradient = scores.sub_(normalizer[:, None]).exp_()
    gradient.scatter_add_(1, target, torch.full_like(target, -1, dtype=wide))
    gradient.masked_fill_(~valid[:, None], 0)
    return total, gradient.to(logits.dtype)
