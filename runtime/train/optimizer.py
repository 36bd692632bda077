"""AdamW on sharded float32 parameters, its learning rate, and which layer or parameter broke a gradient."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

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


@dataclass(frozen=True, kw_only=True)
class GradientNorms:
    """squares: float64 [parameters], squared norm of each whole gradient, the same on every rank."""

    names: Sequence[str]
    squares: Tensor

    @property
    def total(self) -> Tensor:
        """The norm of all gradients together."""
        return self.squares.sum().sqrt()


def gradient_norms(parameters: Iterable[tuple[str, Parameter]]) -> GradientNorms:
    """Return the norms of gradients that are sharded over all processes. Collective.

    Every shard counts once: parameters are sharded over the whole world, never replicated.
    """
    named = [(name, parameter.grad) for name, parameter in parameters if parameter.grad is not None]
    local = [_local(gradient) for _, gradient in named]
    norms = torch._foreach_norm(local)  # pyright: ignore[reportPrivateImportUsage]  # a launch, not one a parameter
    squares = torch.stack(norms).double().square()
    if dist.is_initialized():
        dist.all_reduce(squares)
    return GradientNorms(names=[name for name, _ in named], squares=squares)


def clip_gradients(parameters: Iterable[Parameter], norm: Tensor, limit: float | None) -> None:
    """Scale gradients down so that their norm is at most `limit`. Does not wait for the device."""
    if limit is None:
        return
    factor = (limit / (norm + 1e-6)).clamp(max=1.0)
    gradients = [_local(parameter.grad) for parameter in parameters if parameter.grad is not None]
    if gradients:
        torch._foreach_mul_(gradients, factor.to(gradients[0].dtype))  # pyright: ignore[reportPrivateImportUsage]


class TrainingError(RuntimeError):
    """Training cannot go on: says at which step, and for a broken gradient, on which rank and in which layer."""


class FiniteWatch:
    """Notes, on the device, whether each layer's output and its gradient are finite on this rank."""

    def __init__(self, layers: list[Module], device: torch.device) -> None:
        self._values = torch.zeros(2, len(layers), device=device)
        for number, layer in enumerate(layers):
            layer.register_forward_hook(self._hook(number))

    def reset(self) -> None:
        """Forget what was seen."""
        self._values = torch.zeros_like(self._values)

    def diagnosis(self, norms: GradientNorms) -> str:
        """Say which rank and layer broke first. Collective over all processes; every rank says the same."""
        flags = (~self._values.isfinite()).int()
        everyone = [torch.zeros_like(flags) for _ in range(dist.get_world_size())]
        dist.all_gather(everyone, flags)
        broken = torch.stack(everyone).cpu().bool()  # [rank, output or gradient, layer]
        for direction, (name, first) in enumerate((("the output", min), ("the gradient of the output", max))):
            layers = broken[:, direction].any(0).nonzero()[:, 0].tolist()
            if layers:
                layer = first(layers)
                ranks = broken[:, direction, layer].nonzero()[:, 0].tolist()
                return f"{name} of layer {layer} is not finite on rank {', '.join(map(str, ranks))}"
        finite = norms.squares.isfinite().tolist()
        broken_names = [name for name, ok in zip(norms.names, finite, strict=True) if not ok]
        return f"the gradient of {', '.join(broken_names[:4]) or 'the loss'} is not finite (on some rank)"

    def _hook(self, number: int) -> Any:
        def note(direction: int, tensor: Tensor) -> None:
            # A sum is not finite when an element is not; it costs one pass and no memory.
            self._values[direction, number] += tensor.detach().sum(dtype=torch.float32)

        def hook(module: Module, inputs: Any, output: Any) -> None:
            tensor = output[0] if isinstance(output, tuple) else output
            note(0, tensor)
            if tensor.requires_grad:
                tensor.register_hook(lambda gradient: note(1, gradient))

        return hook


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
