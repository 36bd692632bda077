"""All registered selectors: names and settings, what they promise, what they refuse."""

from __future__ import annotations

import ast
import subprocess
import sys
from dataclasses import FrozenInstanceError, fields, replace
from typing import Any

import pytest
import torch

from select_cases import on_ranks, shard_of
from source_files import relative, sources
from sparsering.kernels.select import DEFAULT_SELECTOR
from sparsering.kernels.select.moba_block import MobaBlock
from sparsering.kernels.select.probe import ShardTensors
from sparsering.kernels.select.registry import option_of, register, selector_of, selectors
from sparsering.kernels.select.rows.xattention import XAttention
from sparsering.kernels.select.sink_window import SinkWindow
from sparsering.kernels.select.vertical_slash import FixedVerticalSlash, FlexVerticalSlash

SMALL: dict[str, dict[str, Any]] = {
    "vertical-slash": {"columns": 20, "slashes": 30, "sink_tokens": 4, "window_tokens": 10},
    "flex": {"column_mass": 0.4, "slash_mass": 0.3},
    "xattention": {"stride": 4, "mass": 0.4},
    "block-mass": {"probe_stride": 4, "least_mass": 0.1},
    "moba-block": {"chunk_tokens": 32, "top_chunks": 3},
    "sink-window": {"sink_tokens": 4, "window_tokens": 20},
}


def queries_and_keys(seed: int = 0, tokens: int = 512) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q, k = (3 * torch.randn(tokens, heads, 8, generator=generator, dtype=torch.float64) for heads in (4, 2))
    return q, k


def test_selectors_are_known_by_name_and_settings():
    assert set(SMALL) <= set(selectors())
    for name, settings in SMALL.items():
        selector = selector_of(name, settings)
        assert type(selector) is selectors()[name]
        assert selector.settings | settings == selector.settings
        assert selector_of(name, selector.settings) == selector
    with pytest.raises(FrozenInstanceError):
        SinkWindow().__setattr__("sink_tokens", 3)


def test_two_selectors_cannot_have_one_name():
    class Other(SinkWindow):
        pass

    with pytest.raises(ValueError, match="selector 'sink-window': is SinkWindow already"):
        register(Other)


@pytest.mark.parametrize("name", list(SMALL))
def test_a_selector_looks_ahead_only_where_it_says_so(name):
    selector, half, block = selector_of(name, SMALL[name]), 256, 16
    q, k = queries_and_keys()
    other_q, other_k = queries_and_keys(seed=1)
    other_q[:half], other_k[:half] = q[:half], k[:half]
    before, after = (
        selector.choose(shard_of(*tensors, block_size=block), scale=0.5) for tensors in ((q, k), (other_q, other_k))
    )
    if before.is_toeplitz:
        same = torch.equal(before.active, after.active)
        if before.columns is not None and after.columns is not None:
            same &= torch.equal(before.columns, after.columns)
    else:
        rows = half // block
        assert not torch.equal(before.active, after.active), "the later half differs"
        same = torch.equal(before.active[:, :rows], after.active[:, :rows])
    assert same == selector.causal


@pytest.mark.parametrize("name", list(SMALL))
@pytest.mark.parametrize("ranks, granularity", [(2, 16), (4, 32)])
def test_every_rank_chooses_what_one_rank_would(name, ranks, granularity):
    selector, (q, k) = selector_of(name, SMALL[name]), queries_and_keys()
    alone = selector.choose(shard_of(q, k, block_size=16), scale=0.5)
    assert alone.own_blocks and alone.column_capacity <= selector.most_columns
    masks = on_ranks(
        ranks,
        lambda rank, collectives: selector.choose(
            shard_of(q, k, block_size=16, ranks=ranks, rank=rank, granularity=granularity),
            scale=0.5,
            collectives=collectives,
        ),
    )
    for mask in masks:
        assert torch.equal(mask.active, alone.active)
        assert alone.columns is None or torch.equal(mask.columns, alone.columns)


def test_no_other_file_knows_a_selector_by_name():
    named = [
        (node.value, relative(path))
        for path in sources("kernels", "runtime", "planner")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and node.value in SMALL
    ]
    assert (DEFAULT_SELECTOR, "kernels/select/__init__.py") in named
    assert len(named) == len(SMALL) + 1, "each in its own file, and the default"


def test_the_command_line_spells_settings_as_they_are_named_unless_told():
    spelt = {one.name: option_of(one) for one in fields(MobaBlock)}
    assert spelt == {"chunk_tokens": "--chunk", "top_chunks": "--top-chunks"}


def _shard(**changes) -> ShardTensors:
    x = torch.zeros(1, 32, 2, 4)
    return ShardTensors(
        **{
            "q": x,
            "k": x,
            "positions": torch.arange(32),
            "seq_len_tokens": 32,
            "block_size": 8,
            "granularity_tokens": 32,
            **changes,
        }
    )


def test_shards_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"q, k: shapes \(2, 32"):
        _shard(q=torch.zeros(2, 32, 2, 4))
    with pytest.raises(ValueError, match="granularity_tokens: 5"):
        _shard(granularity_tokens=5)
    with pytest.raises(ValueError, match="stride: 3"):
        XAttention(stride=3).choose(_shard(), scale=1.0)
    with pytest.raises(ValueError, match="granularity_tokens: 4 is no multiple of the block of 8"):
        XAttention(stride=4).choose(_shard(seq_len_tokens=64, granularity_tokens=4), scale=1.0)
    with pytest.raises(ValueError, match="chunk_tokens: 12"):
        MobaBlock(chunk_tokens=12).choose(_shard(), scale=1.0)


@pytest.mark.parametrize("name", list(SMALL))
def test_packed_documents_are_kept_apart_or_refused(name):
    selector, packed = selector_of(name, SMALL[name]), _shard(documents=torch.zeros(32).int())
    if selector.keeps_documents:
        assert selector.choose(packed, scale=1.0).documents is packed.documents
        return
    with pytest.raises(ValueError, match=f"documents: {name} is not chosen per document yet"):
        selector.choose(packed, scale=1.0)


def test_values_that_a_setting_cannot_have_are_named():
    with pytest.raises(ValueError, match=r"column_mass: must be above 0 and at most 1, not 1\.5"):
        FlexVerticalSlash(column_mass=1.5)
    with pytest.raises(ValueError, match="columns: must be a whole number from 0, not -1"):
        FixedVerticalSlash(columns=-1, slashes=1)
    with pytest.raises(ValueError, match="window_tokens: must be a whole number from 1, not 0"):
        SinkWindow(window_tokens=0)
    with pytest.raises(ValueError, match="selector: 'best' is not one of anchor, block-mass, flex, "):
        selector_of("best", {})
    with pytest.raises(ValueError, match="columns: flex has no such setting; it has column_mass, column_cap"):
        selector_of("flex", {"columns": 3})
    with pytest.raises(ValueError, match="stride: must be a whole number from 1, not True"):
        replace(XAttention(), stride=True)


def test_selectors_of_folders_below_are_found_by_a_process_that_imported_none() -> None:
    code = "from sparsering.kernels.select.registry import selectors; print(*selectors())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert set(SMALL) <= set(done.stdout.split())
