"""What a failed check saw of attention, in a file per rank that numpy reads."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ....traces.files import write_atomically
from .attention import Compared

EVIDENCE = "failed-check"


def write_evidence(folder: Path, compared: Sequence[Compared], *, step: int, rank: int) -> None:
    """Write what was compared and is wrong on this rank, if anything is.

    The file holds for each quantity, as `layer3.out.found` and so on, `positions`, `found`, `wanted` and `bound`.
    """
    wrong = [one for one in compared if not bool(one.excess <= 1)]
    if not wrong:
        return
    arrays: dict[str, np.ndarray] = {}
    for one in wrong:
        name = f"layer{one.sample.layer}.{one.quantity}"
        values = {"positions": one.positions, "found": one.found.double(), "wanted": one.wanted.value,
                  "bound": one.wanted.bound}  # fmt: skip
        arrays |= {f"{name}.{part}": tensor.detach().cpu().numpy() for part, tensor in values.items()}
        arrays[f"{name}.heads"] = np.array([one.sample.head, one.sample.kv_head])
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)  # pyright: ignore[reportArgumentType]  # arrays by name
    write_atomically(folder / f"{EVIDENCE}-step-{step:08d}-rank-{rank}.npz", buffer.getvalue())
