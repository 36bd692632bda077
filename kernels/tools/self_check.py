"""Which backends work on this machine: each is tried on a small problem against the reference."""

from __future__ import annotations

from typing import Any

import torch

from ..api import backend_names, full_attention
from ..mask import AttentionMask

TOKENS, HEADS, KV_HEADS, HEAD_DIM = 500, 4, 2, 64
BLOCK_SIZE = 128  # which every backend takes


def backend_verdicts() -> dict[str, dict[str, Any]]:
    """Return the verdict of every backend: on a GPU where torch finds one, in bfloat16; else on the CPU, in float32.

    Each is tried forward and backward, with grouped queries, columns and a ragged tail. `state` is "works", "wrong"
    or "unavailable"; with `largest_error`, of out and gradients relative to the largest value, or with `reason`.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return {name: try_backend(name, device) for name in backend_names()}


def try_backend(backend: str, device: str) -> dict[str, Any]:
    """Return the verdict of one backend, as `backend_verdicts` describes it."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    try:
        got = _outputs(backend, device, dtype)
    except Exception as error:  # a diagnosis reports whatever keeps a backend from running
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        return {"state": "unavailable", "reason": reason if device == "cuda" else f"not on a CPU ({reason})"}
    expected = _outputs("reference", device, dtype)
    pairs = [(a.double(), b.double()) for a, b in zip(got, expected, strict=True)]
    largest = float(torch.stack([(a - b).abs().max() / b.abs().max() for a, b in pairs]).max())
    state = "works" if largest <= 8 * torch.finfo(dtype).eps else "wrong"  # also when it is NaN
    return {"state": state, "largest_error": largest, "dtype": str(dtype).removeprefix("torch.")}


def _outputs(backend: str, device: str, dtype: torch.dtype) -> list[torch.Tensor]:
    """Return out and the gradients of q, k, v for one seeded problem."""
    generator = torch.Generator().manual_seed(0)

    def draw(heads: int) -> torch.Tensor:
        return torch.randn(1, 512, heads, HEAD_DIM, generator=generator).to(device, dtype).requires_grad_()

    q, k, v = draw(HEADS), draw(KV_HEADS), draw(KV_HEADS)
    active = torch.zeros(HEADS, -(-TOKENS // BLOCK_SIZE), dtype=torch.bool)
    active[:, [0, 3]] = True
    columns = torch.tensor([1, 70, 200], dtype=torch.int32).repeat(HEADS, 1)
    mask = AttentionMask(seq_len_tokens=TOKENS, block_size=BLOCK_SIZE, active=active, columns=columns).to(device)
    out, _ = full_attention(q, k, v, mask, scale=HEAD_DIM**-0.5, backend=backend)
    out.sum().backward()
    gradients = [x.grad for x in (q, k, v) if x.grad is not None]
    return [out.detach(), *gradients]
