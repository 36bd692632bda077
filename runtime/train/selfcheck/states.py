"""Checksums of what ranks keep between steps: parameters, the optimizer's states, its settings.

A checksum is the sum of a tensor's bit patterns as whole numbers, mixed with those of other tensors in their order: one
changed element changes it, and so does any change of several that does not happen to cancel.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import Module

from ....traces.files import sha256_of_bytes

MULTIPLIER = 6364136223846793005  # Knuth's MMIX generator; products wrap around on purpose
WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def checksum(tensors: Iterable[Tensor], device: torch.device) -> Tensor:
    """Return int64, on `device`, of what this rank holds of the tensors, in their order. Does not wait."""
    value = torch.zeros((), dtype=torch.int64, device=device)
    for tensor in tensors:
        held = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        words = held.detach().contiguous().view(WORDS[held.element_size()])
        value = value * MULTIPLIER + words.sum(dtype=torch.int64).to(device) + 1
    return value


def number_of(data: bytes) -> int:
    """Return a whole number of 63 bits that stands for some bytes."""
    return int(sha256_of_bytes(data)[:16], 16) >> 1


class KeptStates:
    """Whether parameters and optimizer states are still, when a step ends, what they were when the last one ended."""

    def __init__(self, model: Module, optimizer: torch.optim.Optimizer, device: torch.device) -> None:
        self._model, self._optimizer, self._device = model, optimizer, device
        self._noted: Tensor | None = None

    def note(self) -> None:
        """Remember the states as they are now."""
        self._noted = self.now()

    def now(self) -> Tensor:
        """Return int64 [2]: checksums of parameters and of the optimizer's tensors, of this rank's shards."""
        states = (one for state in self._optimizer.state.values() for one in state.values() if torch.is_tensor(one))
        return torch.stack([checksum(tensors, self._device) for tensors in (self._model.parameters(), states)])

    def changed(self) -> Tensor:
        """Return bool [2]: whether either differs from what was noted; False where nothing was."""
        if self._noted is None:
            return torch.zeros(2, dtype=torch.bool, device=self._device)
        return self.now() != self._noted


class GatheredWeights:
    """The checksum of one layer's whole parameters, as this rank computes with them, at its next forward pass."""

    def __init__(self, layers: Iterable[Module], device: torch.device) -> None:
        self._device, self._awaited = device, -1
        self.value = torch.zeros((), dtype=torch.int64, device=device)
        for number, layer in enumerate(layers):
            layer.register_forward_pre_hook(self._hook(number))

    def begin(self, layer: int) -> None:
        """Look at this layer when it is next run."""
        self._awaited = layer
        self.value = torch.zeros_like(self.value)

    def _hook(self, number: int) -> Any:
        def look(module: Module, inputs: Any) -> None:
            if number == self._awaited:
                self._awaited = -1
                self.value = checksum(module.parameters(), self._device)

        return look


def settings_of(optimizer: torch.optim.Optimizer) -> Mapping[str, Any]:
    """Return what must be the same on all ranks of how this process computes. Waits for the device."""
    groups = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
    steps = [torch.as_tensor(state["step"]) for state in optimizer.state.values() if "step" in state]
    matmul = torch.backends.cuda.matmul
    return {
        "optimizer": repr(groups),
        "optimizer steps": torch.stack(steps).unique().tolist() if steps else [],
        "float32 products": [torch.get_float32_matmul_precision(), matmul.allow_tf32, torch.backends.cudnn.allow_tf32],
        "16-bit sums": [str(matmul.allow_bf16_reduced_precision_reduction),
                        str(matmul.allow_fp16_reduced_precision_reduction)],
        "deterministic": [torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.deterministic],
        "default type": str(torch.get_default_dtype()),
    }  # fmt: skip
