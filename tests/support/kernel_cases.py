"""Worked attention cases and random masks, shared by the kernel tests."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import numpy as np
import torch

from sparsering.kernels.mask import AttentionMask

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = ["attention-documents", "attention-empty-rows", "attention-ragged-length", "attention-sparse-gqa"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One worked case: tensors [1, S, H, D], its mask, scale, and the expected arrays by name."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    grad_out: torch.Tensor
    mask: AttentionMask
    scale: float
    expected: dict[str, torch.Tensor]
    density: float
    pairs: list[int]


def _ragged(flat: np.ndarray, offsets: np.ndarray) -> list[np.ndarray]:
    return [flat[a:b] for a, b in itertools.pairwise(offsets)]


def load_case(name: str) -> Case:
    """Read one golden attention case."""
    with np.load(GOLDEN / f"{name}.npz") as z:
        data = {key: z[key] for key in z.files}
    seq_len, heads, _ = data["q"].shape
    blocks = -(-seq_len // int(data["block_size"]))
    active = torch.zeros(heads, blocks, dtype=torch.bool)
    for head, diagonals in enumerate(_ragged(data["diagonals"], data["diagonals_offsets"])):
        active[head, torch.from_numpy(diagonals).long()] = True
    lists = _ragged(data["columns"], data["columns_offsets"])
    columns = torch.full((heads, max(len(c) for c in lists) + 2), seq_len, dtype=torch.int32)
    for head, positions in enumerate(lists):
        columns[head, : len(positions)] = torch.from_numpy(positions).int()
    documents = torch.from_numpy(data["documents"]).int() if "documents" in data else None
    mask = AttentionMask(
        seq_len_tokens=seq_len, block_size=int(data["block_size"]), active=active, columns=columns, documents=documents
    )
    q, k, v, grad_out = (torch.from_numpy(data[key])[None] for key in ("q", "k", "v", "grad_out"))
    expected = {key: torch.from_numpy(data[key])[None] for key in ("out", "lse", "dq", "dk", "dv")}
    return Case(
        q=q,
        k=k,
        v=v,
        grad_out=grad_out,
        mask=mask,
        scale=float(data["scale"]),
        expected=expected,
        density=float(data["density"]),
        pairs=data["active_pairs"].tolist(),
    )


def assert_exact(actual: torch.Tensor | None, expected: torch.Tensor | None, *, atol: float = 1e-10) -> None:
    """Equal within atol, infinities included, NaN nowhere."""
    assert actual is not None and expected is not None
    torch.testing.assert_close(actual, expected, rtol=0.0, atol=atol)
