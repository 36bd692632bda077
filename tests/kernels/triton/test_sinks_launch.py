"""The launch that takes sinks into results, interpreted, against torch's operations."""

from __future__ import annotations

import pytest
import torch

from sparsering.kernels.sinks import with_sinks
from sparsering.kernels.triton.sinks import launch_with_sinks


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("head_dim", [16, 40, 128])
def test_the_launch_is_the_definition(head_dim: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(head_dim)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype)

    whole = draw(2, 70, 6, head_dim)
    out, lse, sinks = whole[:, :, 1:4], 40 * draw(2, 3, 70), draw(3)  # some heads: not contiguous
    lse[:, :, 60:], out[:, 60:] = -torch.inf, 0.0  # rows that attend nothing
    sinks[1] = -torch.inf
    sinks[2] = 200.0  # takes nearly all
    expected = with_sinks(out.clone(), lse, sinks)
    others = whole[:, :, [0, 4, 5]].clone()
    found = launch_with_sinks(out, lse.transpose(1, 2).contiguous().transpose(1, 2), sinks)
    assert found[0] is out
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(found[1], expected[1], rtol=1e-6, atol=1e-6)
    assert torch.equal(whole[:, :, [0, 4, 5]], others)
