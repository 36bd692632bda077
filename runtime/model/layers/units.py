"""Which layers FSDP gathers together: each transfer and its copies cost the host time, whatever they carry.

Thirty layers of 7 MB are thirty collectives a pass one by one, five in units of seven.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch.nn import Module

UNIT_PARAMETERS = 1 << 25  # 67 MB gathered in 16 bits: long beside a launch, little beside a layer's activations
FEWEST_UNITS = 4  # where there are so many layers: what is gathered or scattered hides behind another unit's work


def layers_of_a_unit(layers: int, layer_parameters: int) -> int:
    """Return how many of a model's equal layers are gathered together, at least one."""
    fitting = max(1, UNIT_PARAMETERS // max(1, layer_parameters))
    return max(1, min(fitting, layers // FEWEST_UNITS))


def units(layers: Sequence[Module]) -> list[list[Module]]:
    """Return a model's layers in units, in order. Where layers differ, the largest decides how many go together."""
    largest = max((sum(one.numel() for one in layer.parameters()) for layer in layers), default=1)
    count = layers_of_a_unit(len(layers), largest)
    return [list(layers[first : first + count]) for first in range(0, len(layers), count)]
