"""Taking the fewest blocks that hold a share of a row's mass, without sorting: what kernels of selectors share."""

# Triton's language is not Python to a type checker.
# pyright: reportArgumentType=false, reportIndexIssue=false, reportCallIssue=false, reportOperatorIssue=false

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def take_fewest(values, seen, forced, mass):
    """bool [SIZE]: forced blocks, then the fewest others of those seen, the highest values first, ties by lower index.

    values float32 [SIZE], none negative, 0 where not seen; mass: share of their sum that is wanted.
    """
    exact = values.to(tl.float64)
    wanted = mass * tl.sum(exact, 0)
    reached = tl.sum(tl.where(forced, exact, 0.0), 0)
    # Of values that are not negative, the bits rise with the value: find the highest cut that reaches the mass.
    others = seen & (forced == 0)
    bits = tl.where(others, values.to(tl.int32, bitcast=True), -1)
    cut = 0
    for step in range(0, 31):
        trial = cut | (1 << (30 - step))
        enough = reached + tl.sum(tl.where(bits >= trial, exact, 0.0), 0) >= wanted
        cut = tl.where(enough, trial, cut)
    above = bits > cut
    tied = (bits == cut) & (values > 0.0)
    missing = wanted - reached - tl.sum(tl.where(above, exact, 0.0), 0)
    value = tl.max(tl.where(tied, exact, 0.0), 0)
    ties = tl.ceil(missing / tl.where(value > 0.0, value, 1.0))
    return forced | above | (tied & (tl.cumsum(tied.to(tl.int32), 0).to(tl.float64) <= ties))
