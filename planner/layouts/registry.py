"""Layouts by name: each builds the schedule of one direction from a shape and a few parameters."""

from __future__ import annotations

from collections.abc import Callable

from ...traces.errors import InputError
from ..schedule.pairs import Pairs
from ..schedule.schedule import Direction, Schedule
from ..schedule.shape import AttentionShape
from .collective import collective
from .gather import gather
from .hierarchical import hierarchical
from .ring import ring
from .two_level import two_level
from .ulysses import ulysses

LAYOUTS: dict[str, Callable[..., Schedule]] = {
    "ring": ring,
    "gather": gather,
    "hierarchical": hierarchical,
    "two_level": two_level,
    "collective": collective,
    "ulysses": ulysses,
}


def build(
    layout: str,
    parameters: dict[str, int],
    *,
    shape: AttentionShape,
    direction: Direction,
    pairs: Pairs | None = None,
) -> Schedule:
    """Build a schedule by name; InputError for an unknown layout or parameter.

    pairs: the (query shard, key shard) pairs that may have work; None: all. Others are neither computed nor sent.
    """
    if layout not in LAYOUTS:
        raise InputError(f"{layout!r} is not one of {sorted(LAYOUTS)}", field="layout")
    try:
        return LAYOUTS[layout](shape=shape, direction=direction, pairs=pairs, **parameters)
    except TypeError as error:
        raise InputError(f"{parameters} do not fit layout {layout!r}", field="parameters") from error
