"""What a layer takes beside its launches: before and after them, for gradients that land, and of the host."""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import Field

from ..schedule.schedule import Direction, Transfer
from ..specs import Strict


class HostPrices(Strict):
    """Microseconds of the thread that issues a layer, beside its launches: a direction's beginning and end, a call."""

    forward_layer: float = Field(ge=0)
    backward_layer: float = Field(ge=0)
    call: float = Field(ge=0)


@dataclass(frozen=True, kw_only=True)
class LayerConstants:
    """Microseconds of a rank's compute stream, and of the host that issues a layer.

    delta_us_per_token: before backward, of rowsum(dout * out); round_us_per_token: after it, of rounding dK and dV to
    the type of K and V; landing_us_per_byte: of adding gradients that landed to their sum. host: None where the host is
    taken to be ahead of the device at all times.
    """

    delta_us_per_token: float = 0.0
    round_us_per_token: float = 0.0
    landing_us_per_byte: float = 0.0
    host: HostPrices | None = None

    def begin_us(self, direction: Direction, tokens: int) -> float:
        """Return what comes before the first phase of a rank with so many tokens."""
        return self.delta_us_per_token * tokens if direction == "backward" else 0.0

    def end_us(self, direction: Direction, tokens: int) -> float:
        """Return what comes after its last."""
        return self.round_us_per_token * tokens if direction == "backward" else 0.0

    def landing_us(self, transfer: Transfer, rank: int) -> float:
        """Return what follows a rank's wait for a transfer, if gradients of its keys came with it."""
        lands = transfer.kind == "dkv" and transfer.transport in ("p2p", "pull") and transfer.destination == rank
        return transfer.capacity_bytes * self.landing_us_per_byte if lands else 0.0


NO_CONSTANTS = LayerConstants()
