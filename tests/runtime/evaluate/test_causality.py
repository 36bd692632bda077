"""What a selector says of itself, tried out: later tokens change nothing of earlier ones under a causal one."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch

from eval_cases import BYTES, byte_model
from sparsering.kernels.select.registry import Selector, selectors
from sparsering.runtime.evaluate.causality import Ahead, seen_ahead
from sparsering.runtime.pattern.selectors import make_selector
from sparsering.traces.errors import InputError

SIZE, TOKENS = 16, 256
# Settings under which a short sequence is sparse, of the selectors that ship; others are tried with their defaults.
SMALL: Mapping[str, Mapping[str, int | float]] = {
    "block-mass": {"probe_stride": 4, "least_mass": 0.08},
    "flex": {"column_mass": 0.05, "slash_mass": 0.05}, "moba-block": {"chunk_tokens": 32, "top_chunks": 2},
    "shifted-groups": {"group_tokens": 64}, "sink-window": {"sink_tokens": 3, "window_tokens": 40},
    "vertical-slash": {"columns": 20, "slashes": 20, "sink_tokens": 2, "window_tokens": 4},
    "xattention": {"stride": 4, "mass": 0.4},
}  # fmt: skip
KNOWN = selectors()


def tried(selector: Selector, *, first: int, seed: int, dtype: torch.dtype) -> Ahead:
    torch.manual_seed(seed)
    ids = torch.randint(0, BYTES, (TOKENS,))
    changed = ids.clone()
    changed[first:] = (ids[first:] + torch.randint(1, BYTES, (TOKENS - first,))) % BYTES
    return seen_ahead(byte_model(dtype=dtype, seed=seed), ids, selector, changed=changed, block_size=SIZE)


@pytest.mark.parametrize("name", [name for name, kind in KNOWN.items() if kind.causal])
@pytest.mark.parametrize("first", [SIZE, 9 * SIZE, TOKENS - SIZE])
@pytest.mark.parametrize(("dtype", "most"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_later_tokens_change_nothing_under_a_causal_selector(name: str, first: int, dtype: torch.dtype, most: float):
    ahead = tried(make_selector(name, SMALL.get(name)), first=first, seed=first, dtype=dtype)
    assert ahead.rows == 0
    assert ahead.logits <= most


@pytest.mark.parametrize("name", [name for name, kind in KNOWN.items() if not kind.causal])
def test_they_do_under_one_that_is_not(name: str):
    """On some seed: a selector that is not causal need not look ahead every time."""
    seen = [tried(make_selector(name, SMALL.get(name)), first=9 * SIZE, seed=seed, dtype=torch.float64)
            for seed in range(3)]  # fmt: skip
    assert max(one.logits for one in seen) > 1e-3
    assert max(one.rows for one in seen) > 0


def test_selectors_of_both_kinds_are_registered():
    """Were there none, the tests above would hold nothing."""
    assert {kind.causal for kind in KNOWN.values()} == {True, False}


def test_what_ships_is_tried_where_it_is_sparse():
    """With a default under which a short sequence is dense the tests above would hold nothing."""
    ours = {name for name, kind in KNOWN.items() if kind.__module__.startswith("sparsering.kernels.")}
    assert ours - set(SMALL) == {"anchor"}  # dense by its nature


def test_a_change_within_a_block_is_refused():
    ids = torch.zeros(TOKENS, dtype=torch.int64)
    changed = ids.clone()
    changed[SIZE + 1] = 1
    for other in (changed, ids):
        with pytest.raises(InputError, match="begins no block of 16"):
            seen_ahead(byte_model(), ids, make_selector("sink-window"), changed=other, block_size=SIZE)
