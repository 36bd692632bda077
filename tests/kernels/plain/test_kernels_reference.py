"""The float64 reference against worked cases, against autograd, and against its own definition on shards."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import kernel_calls as calls
from kernel_cases import CASES, assert_exact, load_case
from sparsering.kernels import api
from sparsering.kernels.mask import AttentionMask, block_part, column_part, whole
from sparsering.kernels.plain.reference import reference_attention, reference_gradients


@pytest.mark.parametrize("name", CASES)
def test_agrees_with_the_worked_case(name):
    case = load_case(name)
    out, lse = reference_attention(case.q, case.k, case.v, case.mask, scale=case.scale)
    grads = reference_gradients(case.grad_out, case.q, case.k, case.v, case.mask, scale=case.scale)
    for key, value in zip(("out", "lse", "dq", "dk", "dv"), (out, lse, *grads), strict=True):
        assert_exact(value, case.expected[key])


@pytest.mark.parametrize("name", CASES)
def test_counts_the_pairs_of_the_worked_case(name):
    case = load_case(name)
    at = torch.arange(case.q.shape[1])
    assert [int(whole(case.mask, head, at, at).sum()) for head in range(case.mask.heads)] == case.pairs


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("broken", ["diagonal", "column", "document"])
def test_a_wrong_index_fails(name, broken):
    case = load_case(name)
    mask = case.mask
    if broken == "diagonal":
        active = mask.active.clone()
        active[-1, 1] ^= True
        mask = dataclasses.replace(mask, active=active)
    elif broken == "column":
        assert mask.columns is not None
        columns = mask.columns.clone()
        columns[-1, 0 if columns[-1, 0] == 0 else -1] = mask.seq_len_tokens if columns[-1, 0] == 0 else 0
        mask = dataclasses.replace(mask, columns=columns.sort(dim=1).values)
        if mask.active[-1].all():
            pytest.skip("every block of that head is active: its columns change nothing")
    else:
        documents = (
            torch.zeros(mask.seq_len_tokens, dtype=torch.int32)
            if mask.documents is not None
            else (torch.arange(mask.seq_len_tokens) // 100).int()
        )
        mask = dataclasses.replace(mask, documents=documents)
    out, _ = reference_attention(case.q, case.k, case.v, mask, scale=case.scale)
    assert (out - case.expected["out"]).abs().max() > 1e-6


def test_gradients_agree_with_autograd_through_a_dense_softmax():
    case = load_case("attention-sparse-gqa")
    leaves = [x.clone().requires_grad_() for x in (case.q, case.k, case.v)]
    at = torch.arange(case.q.shape[1])
    for head in range(case.mask.heads):
        pairs = whole(case.mask, head, at, at)
        scores = leaves[0][0, :, head] @ leaves[1][0, :, head // 2].T * case.scale
        out = torch.softmax(scores.masked_fill(~pairs, -torch.inf), -1) @ leaves[2][0, :, head // 2]
        out.backward(case.grad_out[0, :, head])
    grads = reference_gradients(case.grad_out, case.q, case.k, case.v, case.mask, scale=case.scale)
    for leaf, grad in zip(leaves, grads, strict=True):
        assert_exact(leaf.grad, grad)


def test_block_part_and_column_part_are_disjoint_and_make_the_whole():
    case = load_case("attention-ragged-length")
    at = torch.arange(case.mask.seq_len_tokens)
    assert case.mask.columns is not None
    for head in range(case.mask.heads):
        blocks = block_part(case.mask, head, at, at)
        columns = torch.zeros_like(blocks)
        slots = case.mask.columns[head]
        filled = slots < case.mask.seq_len_tokens
        columns[:, slots[filled].long()] = column_part(case.mask, head, at)[:, filled]
        assert not (blocks & columns).any()
        assert torch.equal(blocks | columns, whole(case.mask, head, at, at))


def test_padding_attends_nothing_and_is_never_attended():
    active = torch.ones(1, 2, dtype=torch.bool)
    mask = AttentionMask(seq_len_tokens=5, block_size=3, active=active, columns=torch.tensor([[1, 5]]).int())
    at = torch.arange(9)
    pairs = whole(mask, 0, at, at)
    assert torch.equal(pairs[:5, :5], torch.ones(5, 5, dtype=torch.bool).tril())
    assert not pairs[5:].any() and not pairs[:, 5:].any()


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("seq_len_tokens", 0, "seq_len_tokens: 0"),
        ("block_size", -1, "block_size: -1"),
        ("active", torch.ones(2, 3, dtype=torch.bool), r"active: shape \(2, 3\)"),
        ("active", torch.ones(2, 4), "active: dtype torch.float32"),
        ("columns", torch.zeros(2, 3), "columns: dtype torch.float32"),
        ("columns", torch.zeros(3, 3).int(), r"columns: shape \(3, 3\)"),
        ("documents", torch.zeros(7).int(), r"documents: shape \(7,\)"),
    ],
)
def test_mask_refuses_what_does_not_fit(field, value, message):
    good = {"seq_len_tokens": 8, "block_size": 2, "active": torch.ones(2, 4, dtype=torch.bool)}
    with pytest.raises(ValueError, match=message):
        AttentionMask(**{**good, field: value})


def test_merge_of_two_empty_partials_is_empty():
    out = torch.zeros(1, 2, 1, 3)
    lse = torch.tensor([[[-torch.inf, 0.5]]])
    merged, merged_lse = api.merge(out, torch.full_like(lse, -torch.inf), out + 1, lse)
    assert torch.equal(merged_lse, lse)
    assert torch.equal(merged[0, :, 0, 0], torch.tensor([0.0, 1.0]))


def test_api_refuses_unknown_backends_and_foreign_indices():
    mask = AttentionMask(seq_len_tokens=4, block_size=2, active=torch.ones(1, 2, dtype=torch.bool))
    at = torch.arange(4)
    with pytest.raises(ValueError, match="backend: 'cuda'"):
        api.block_index(mask, at, at, backend="cuda")
    index = api.block_index(mask, at, at, backend="reference")
    q = torch.zeros(1, 4, 1, 2)
    other = api.column_index(mask, at, backend="blockwise")
    with pytest.raises(ValueError, match="index: made for one backend each, not for blockwise and reference"):
        calls.block_forward(q, q, q, index, scale=1.0, columns=(q, q, other))
    with pytest.raises(ValueError, match="neither keys nor columns"):
        api.forward(api.Queries(q=q, scale=1.0))
    with pytest.raises(ValueError, match="q_positions"):
        api.column_index(mask, at.double(), backend="reference")
    with pytest.raises(ValueError, match="dtypes"):
        calls.block_forward(q, q.double(), q.double(), index, scale=1.0)
