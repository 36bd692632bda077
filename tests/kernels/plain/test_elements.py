"""Windows, softcaps and learned sinks in plain torch, against the definition written out apart."""

from __future__ import annotations

import pytest
import torch

from element_cases import element_case
from element_checks import check_backend
from sparsering.kernels import window
from sparsering.kernels.api import block_index, full_attention
from sparsering.kernels.mask import AttentionMask, block_part, column_part, whole
from sparsering.kernels.values import Queries
from sparsering.traces.pattern import window_diagonals


@pytest.mark.parametrize("backend", ["reference", "blockwise"])
@pytest.mark.parametrize("seed", range(60))
def test_plain_backends_agree_with_the_definition(seed: int, backend: str) -> None:
    check_backend(element_case(seed), backend)


@pytest.mark.parametrize("seed", range(20))
def test_masks_agree_with_the_definition_and_their_parts_are_disjoint(seed: int) -> None:
    case = element_case(seed)
    mask, tokens = case.mask, case.given.q.shape[1]
    at = torch.arange(tokens)
    for head, pairs in enumerate(case.attended.pairs(tokens)):
        assert torch.equal(whole(mask, head, at, at), pairs)
        in_columns = torch.zeros_like(pairs)
        if mask.columns is not None:
            own = mask.columns[head].long()
            held = own < mask.seq_len_tokens
            in_columns[:, own[held]] = column_part(mask, head, at)[:, held]
        in_blocks = block_part(mask, head, at, at)
        assert not (in_blocks & in_columns).any()
        assert torch.equal(in_blocks | in_columns, pairs)


def test_kernels_and_traces_cut_the_same_diagonals() -> None:
    for block_size in (1, 16, 64):
        for length in range(0, 4 * block_size + 3):
            inside, edges = window_diagonals(length, block_size, 3)
            assert tuple(edges) == window.edge_diagonals(length, block_size, 3)
            assert len(inside) == min(window.whole_diagonals(length, block_size), 3)


def test_a_window_as_long_as_the_sequence_is_dense() -> None:
    nothing = torch.zeros(2, 7, dtype=torch.bool)
    mask = AttentionMask(seq_len_tokens=100, block_size=16, active=nothing, windows=(100, 0))
    assert mask.active[0].all()
    assert not mask.active[1].any()
    assert AttentionMask(seq_len_tokens=9, block_size=4, active=mask.active[:, :3], windows=(0, 0)).windows is None


@pytest.mark.parametrize(("windows", "told"), [((4,), "1 of them for 2 heads"), ((4, -1), "-1 is negative")])
def test_windows_that_do_not_fit_are_refused(windows: tuple[int, ...], told: str) -> None:
    with pytest.raises(ValueError, match=f"windows: {told}"):
        AttentionMask(seq_len_tokens=9, block_size=4, active=torch.ones(2, 3, dtype=torch.bool), windows=windows)


def test_heads_take_their_windows_along() -> None:
    mask = AttentionMask(seq_len_tokens=9, block_size=4, active=torch.zeros(3, 3, dtype=torch.bool), windows=(1, 5, 8))
    assert mask.of_heads(slice(1, 3)).windows == (5, 8)
    assert mask.of_heads(torch.tensor([2, 0, 1])).windows == (8, 1, 5)


def test_sinks_of_another_number_are_refused() -> None:
    case = element_case(0)
    q, k, v = case.given.q, case.given.k, case.given.v
    with pytest.raises(ValueError, match="one logit a query head"):
        full_attention(q, k, v, case.mask, scale=1.0, backend="blockwise", sinks=torch.zeros(q.shape[2] + 1))


def test_a_softcap_that_is_no_cap_is_refused() -> None:
    with pytest.raises(ValueError, match="softcap: 0"):
        Queries(q=torch.zeros(1, 4, 1, 8), scale=1.0, softcap=0.0)


def test_any_placement_of_a_window_is_right() -> None:
    """Striped tokens: edges whose keys lie in another shard, or nowhere near."""
    case = element_case(3)
    mask, tokens = case.mask, case.given.q.shape[1]
    for own, keys in ((slice(0, None, 2), slice(1, None, 2)), (slice(1, None, 3), slice(0, None, 1))):
        q_positions, k_positions = torch.arange(tokens)[own], torch.arange(tokens)[keys]
        index = block_index(mask, q_positions, k_positions, backend="blockwise").data
        for head in range(mask.heads):
            found = torch.zeros(len(q_positions), len(k_positions), dtype=torch.bool)
            for tile in index.patterns[index.pattern_of_head[head]]:
                scores = torch.zeros(1, 1, tile.rows.stop - tile.rows.start, len(k_positions[tile.keys]))
                tile.hide(scores)
                block = found[tile.rows]
                block[:, tile.keys] = scores[0, 0] == 0
                found[tile.rows] = block
            assert torch.equal(found, block_part(mask, head, q_positions, k_positions))


@pytest.mark.parametrize("sink", [-torch.inf, -1e4, 0.0, 1e4])
def test_rows_that_attend_nothing_stay_empty_beside_any_sink(sink: float) -> None:
    mask = AttentionMask(seq_len_tokens=40, block_size=16, active=torch.zeros(1, 3, dtype=torch.bool))
    q = torch.randn(1, 48, 1, 8, dtype=torch.float64, requires_grad=True)
    sinks = torch.tensor([sink], dtype=torch.float64, requires_grad=True)
    out, lse = full_attention(q, q.detach(), q.detach(), mask, scale=1.0, backend="blockwise", sinks=sinks)
    assert (out == 0).all() and (lse == -torch.inf).all()
    out.sum().backward()
    assert q.grad is not None and sinks.grad is not None
    assert (q.grad == 0).all() and (sinks.grad == 0).all()
