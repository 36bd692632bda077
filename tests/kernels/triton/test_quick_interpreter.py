"""The interpreter that tests run kernels in: quickened, it computes what it computes as it comes."""

from __future__ import annotations

import pytest
import torch

import quick_interpreter

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("the interpreter is for machines without a GPU", allow_module_level=True)
import triton
import triton.language as tl
from triton.runtime import interpreter

from sparsering.kernels.jit import run


@triton.jit
def _scaled(values, factor):
    return tl.where(values > 0, values * factor, tl.exp(values.to(tl.float32)))


@triton.jit
def _sums_kernel(values, sums, ROWS: tl.constexpr, SIZE: tl.constexpr):
    for row in range(ROWS):
        at = row * SIZE + tl.arange(0, SIZE)
        loaded = tl.load(values + at)
        products = tl.sum(tl.sum(loaded[:, None] * at[None, :], axis=1), axis=0)
        tl.store(sums + row, tl.sum(_scaled(loaded, 2.0), axis=0) + tl.max(loaded, axis=0) + products)


def _values() -> torch.Tensor:
    return torch.randn(3, 16, generator=torch.Generator().manual_seed(0))


def _sums(values: torch.Tensor) -> torch.Tensor:
    sums = torch.full((len(values),), torch.nan)
    run(_sums_kernel, (1,), values, sums, ROWS=values.shape[0], SIZE=values.shape[1])
    return sums


def test_kernels_that_call_others_are_right_launch_after_launch() -> None:
    values = _values()
    right = torch.where(values > 0, 2 * values, values.exp()).sum(1) + values.amax(1)
    right += values.sum(1) * torch.arange(values.numel()).view(values.shape).sum(1)
    for _ in range(2):  # what a launch patches is as it was when it has ended
        with pytest.raises(ValueError, match="outside"):
            tl.arange(0, 16)
        torch.testing.assert_close(_sums(values), right, atol=1e-3, rtol=1e-5)


KINDS = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.uint8, torch.int32, torch.int64]


@pytest.mark.parametrize("dtype", KINDS, ids=str)
def test_the_same_bits_as_it_comes(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is kept by type and shape was kept from the types before, too."""
    values = (3 * _values().abs() if dtype == torch.uint8 else 3 * _values()).to(dtype)
    quick = _sums(values)
    for holder, name, before in quick_interpreter.AS_IT_COMES:
        assert getattr(holder, name) != before, "it was not quickened"
        monkeypatch.setattr(holder, name, before)
    assert quick.isfinite().all() and torch.equal(quick, _sums(values))


def test_nobody_looks_at_the_overflows_that_are_left_out() -> None:
    """In debug mode somebody would, and they would be computed."""
    (options,) = (before for _, name, before in quick_interpreter.AS_IT_COMES if name == "options")
    assert options.sanitize_overflow and not options.debug
    assert not interpreter.interpreter_builder.options.sanitize_overflow
