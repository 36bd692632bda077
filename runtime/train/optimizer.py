"""AdamW on sharded float32 parameters, its learning rate, and a gradient norm that tells which parameter broke it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import Module, Parameter

from .config import OptimizerSection


def make_optimizer(model: Module, section: OptimizerSection) -> torch.optim.AdamW:
    """Return AdamW over the model's parameters; biases and norms (one dimension) do not decay."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": section.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=section.learning_rate,
        betas=section.betas,
        eps=section.epsilon,
        fused=all(p.is_cuda for p in parameters),
    )


def learning_rate(step: int, section: OptimizerSection, steps: int) -> float:
    """Return the rate of optimizer step `step` (from 0) of `steps`: a linear warm-up, then a cosine to its minimum."""
    if step < section.warmup_steps:
        return section.learning_rate * (step + 1) / section.warmup_steps
    done = (step - section.warmup_steps) / max(1, steps - section.warmup_steps)
    cosine = 0.5 * (1.0 + math.cos(math.pi * min(done, 1.0)))
    return section.learning_rate * (section.minimum_share + (1.0 - section.minimum_share) * cosine)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the rate of all groups."""
    for group in optimizer.param_groups:
        group["lr"] = rate


@dataclass(frozen=True, kw_only=True)
class GradientNorms:
    """squares: float64 [parameters], squared norm of each whole gradient, the same on every rank."""

    names: Sequence[str]
    squares: Tensor

    @property
    def total(self) -> Tensor:
        """The norm of all gradients together."""
        return self.squares.sum().sqrt()

    def broken(self) -> list[str]:
        """Names of the parameters whose gradient is not finite."""
        finite = torch.isfinite(self.squares).tolist()
        return [name for name, ok in zip(self.names, finite, strict=True) if not ok]


def gradient_norms(parameters: Iterable[tuple[str, Parameter]]) -> GradientNorms:
    """Return the norms of gradients that are sharded over all processes. Collective.

    Every shard counts once: parameters are sharded over the whole world, never replicated.
    """
    named = [(name, parameter.grad) for name, parameter in parameters if parameter.grad is not None]
    local = [_local(gradient) for _, gradient in named]
    squares = torch.stack([torch.linalg.vector_norm(part).double() for part in local]).square()
    if dist.is_initialized():
        dist.all_reduce(squares)
    return GradientNorms(names=[name for name, _ in named], squares=squares)


def clip_gradients(parameters: Iterable[Parameter], norm: Tensor, limit: float | None) -> None:
    """Scale gradients down so that their norm is at most `limit`. Does not wait for the device."""
    if limit is None:
        return
    factor = (limit / (norm + 1e-6)).clamp(max=1.0)
    for parameter in parameters:
        if parameter.grad is not None:
            _local(parameter.grad).mul_(factor)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
