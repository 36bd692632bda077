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
    hidden: Tensor, weight: Tensor, labels: Tensor, *, implementation: LossName, bias: Tensor | None = None,
    softcap: float | None = None, chunk_tokens: int = 2048,
) -> Tensor:  # fmt: skip
    """Return the float32 sum over tokens of -log softmax(logits)[label]; labels of -100 count nothing.

    logits = hidden @ weight.T + bias, or softcap * tanh(logits / softcap). hidden [T, E], weight [V, E], bias [V],
    labels int64 [T]. No valid label gives 0 and zero gradients. implementation "liger" takes liger-kernel's fused
    kernels (CUDA), "chunked" plain torch, `chunk_tokens` at a time.
    """
    if implementation == "liger":
        return _liger_sum(hidden, weight, labels, bias, softcap)
    total = _ChunkedCrossEntropy.apply(hidden, weight, bias, labels, softcap, chunk_tokens)
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


def _liger_sum(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, softcap: float | None) -> Tensor:
    from liger_kernel.transformers.fused_linear_cross_entropy import (  # pyright: ignore[reportMissingImports]
        LigerFusedLinearCrossEntropyLoss,
    )

    loss = LigerFusedLinearCrossEntropyLoss(
        ignore_index=IGNORED_LABEL, reduction="sum", softcap=softcap, accum_dtype=torch.float32
    )
    return loss(weight, hidden, labels, bias).float()


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Computes the gradients along with the sum, chunk by chunk, so that no logits are kept or computed twice."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, softcap: float | None,
        chunk_tokens: int,
    ) -> Tensor:  # fmt: skip
        """Return the sum of the losses, and keep what backward scales: gradients of hidden, weight and bias."""
        wide = torch.promote_types(hidden.dtype, torch.float32)
        total = torch.zeros((), dtype=wide, device=hidden.device)
        grad_hidden = torch.zeros_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=wide)
        grad_bias = None if bias is None else torch.zeros_like(bias, dtype=wide)
        for start in range(0, hidden.shape[0], chunk_tokens):
            rows = slice(start, start + chunk_tokens)
            logits = hidden[rows] @ weight.T
            part, grad_logits = _chunk(logits if bias is None else logits + bias, labels[rows], softcap, wide)
            total += part
            grad_hidden[rows] = grad_logits @ weight
            grad_weight += grad_logits.T @ hidden[rows]
            if grad_bias is not None:
                grad_bias += grad_logits.sum(0, dtype=wide)
        given_back = None if bias is None or grad_bias is None else grad_bias.to(bias.dtype)
        ctx.save_for_backward(grad_hidden, grad_weight.to(weight.dtype), given_back)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        factor = grads[0]
        scaled = (None if saved is None else saved * factor.to(saved.dtype) for saved in ctx.saved_tensors)
        return *scaled, None, None, None


def _chunk(logits: Tensor, labels: Tensor, softcap: float | None, wide: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the chunk's summed loss and the gradient of its logits before the cap, in the logits' type."""
    valid = labels != IGNORED_LABEL
    target = torch.where(valid, labels, 0)[:, None]
    scores = logits.to(wide)
    capped = None
    if softcap is not None:
        capped = torch.tanh(scores / softcap)
        scores = softcap * capped
    normalizer = torch.logsumexp(scores, dim=-1)
    chosen = scores.gather(1, target)[:, 0]
    total = torch.where(valid, normalizer - chosen, 0).sum()
    gradient = scores.sub_(normalizer[:, None]).exp_()
    gradient.scatter_add_(1, target, torch.full_like(target, -1, dtype=wide))
    gradient.masked_fill_(~valid[:, None], 0)
    if capped is not None:
        gradient.mul_(1 - capped**2)
    return total, gradient.to(logits.dtype)
