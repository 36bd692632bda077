"""What a search looks at: every placement and layout that makes sense for a length and a cluster, and plain ones.

A *plain* layout is what people use without a planner (contiguous, zigzag or striped ring, striping with an all-gather,
a striped hierarchical ring); each plan is compared with all of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..layouts.layout import Layout, Offers
from ..layouts.registry import known_layouts
from ..plan import AttentionSpec
from ..schedule.backends import facts_of
from ..schedule.placement import REGULAR_PLACEMENTS, Placement, balanced

GRANULARITY_BLOCKS = (1, 2, 4, 8)
# Coarser units than a block may pad the sequence, but by no more than this.
MAX_PADDING = 1.125


@dataclass(frozen=True, kw_only=True)
class PlacementChoice:
    """A placement by name and unit."""

    name: str
    granularity_tokens: int

    @property
    def regular(self) -> bool:
        """Whether neighbours among a rank's blocks are at one distance, all along or nearly so."""
        return self.name != "balanced"

    def __str__(self) -> str:
        return f"{self.name} ({self.granularity_tokens} tokens)"

    def build(
        self, *, seq_len_tokens: int, world_size: int, block_size: int, block_load: NDArray[np.float64]
    ) -> Placement:
        """Return the placement. block_load: work of each mask block as queries; only "balanced" looks at it."""
        sizes = {"seq_len_tokens": seq_len_tokens, "world_size": world_size}
        if self.name != "balanced":
            return REGULAR_PLACEMENTS[self.name](granularity_tokens=self.granularity_tokens, **sizes)
        blocks_per_unit = self.granularity_tokens // block_size
        assert blocks_per_unit * block_size == self.granularity_tokens, "balanced units are whole blocks"
        load = np.add.reduceat(block_load, np.arange(0, block_load.size, blocks_per_unit))
        return balanced(granularity_tokens=self.granularity_tokens, unit_load=load, **sizes)


Candidate = tuple[PlacementChoice, Layout]  # the layout is that of both directions


def placement_choices(
    attention: AttentionSpec, *, world_size: int, names: tuple[str, ...] = ()
) -> list[PlacementChoice]:
    """Return the placements worth a look, the plainest first; names: those to look at, empty: all."""
    block_size, seq_len_tokens = attention.block_size, attention.seq_len_tokens
    choices = [
        PlacementChoice(name=name, granularity_tokens=block_size) for name in ("striped", "zigzag", "contiguous")
    ]
    for blocks in GRANULARITY_BLOCKS:
        granularity = blocks * block_size
        padded = -(-seq_len_tokens // (world_size * granularity)) * world_size * granularity
        if blocks == 1 or padded <= MAX_PADDING * seq_len_tokens:
            choices += [PlacementChoice(name=name, granularity_tokens=granularity) for name in ("striped", "balanced")]
    choices.append(PlacementChoice(name="striped", granularity_tokens=1))
    return [choice for choice in dict.fromkeys(choices) if not names or choice.name in names]


def layout_choices(offers: Offers) -> list[Layout]:
    """Return what all layouts, or those named, propose: the plainest first, and before all that keeps K/V or splits."""
    asked = [layout for layout in known_layouts() if not offers.named or layout.name in offers.named]
    found = dict.fromkeys(one for layout in asked for one in layout.candidates(offers))
    return sorted(found, key=lambda one: one.kept_slots is not None or one.head_groups > 1)


def baselines(offers: Offers, *, block_size: int) -> list[Candidate]:
    """Return the plain layouts of the cluster, the plainest first."""
    return [
        (PlacementChoice(name=placement, granularity_tokens=block_size), one)
        for layout in known_layouts()
        for placement, one in layout.baselines(offers)
    ]


def why_not_executable(placement: PlacementChoice, *, backend: str, block_size: int) -> str | None:
    """Return why the backend cannot execute this, in a few words; None when it can."""
    if facts_of(backend).whole_blocks and placement.granularity_tokens % block_size:
        return f"{backend} needs whole blocks"
    return None
