"""Anchors: first tokens that queries of every packed document attend; every backend against a dense softmax."""

from __future__ import annotations

import pytest
import torch

from sparsering.kernels import api
from sparsering.kernels.mask import AttentionMask, block_part, column_part, whole

TOKENS, PADDING, BLOCK, SCALE = 100, 28, 32, 0.3
HEADS, KV_HEADS, DIM = 4, 2, 16
ENDS = (40, 41, 77)  # the first document ends within a block, whose rows of the next one attend the anchors too


def problem(*, anchors: int, toeplitz: bool, windows: bool, own: bool) -> AttentionMask:
    generator = torch.Generator().manual_seed(1)
    blocks = -(-TOKENS // BLOCK)
    active = torch.rand((HEADS, blocks) if toeplitz else (HEADS, blocks, blocks), generator=generator) < 0.5
    (active[:, 0] if toeplitz else active.diagonal(dim1=1, dim2=2))[:] = own
    columns = torch.full((HEADS, 12), TOKENS)
    for head in range(HEADS):
        others = anchors + torch.randperm(TOKENS - anchors, generator=generator)[: 3 * head]
        columns[head, : anchors + 3 * head] = torch.cat([torch.arange(anchors), others.sort().values])
    documents = sum((torch.arange(TOKENS + PADDING) >= end).int() for end in ENDS)
    assert isinstance(documents, torch.Tensor)
    return AttentionMask(
        seq_len_tokens=TOKENS, block_size=BLOCK, active=active, columns=columns.int(), documents=documents,
        windows=(0, 5, 40, 70) if windows else None, anchors=anchors,
    )  # fmt: skip


def pairs(mask: AttentionMask, head: int) -> torch.Tensor:
    """bool [S, S], written out: what the mask's columns, blocks, windows and anchors mean."""
    at = torch.arange(TOKENS)
    q, k = at[:, None], at[None, :]
    block = q // BLOCK - k // BLOCK
    whole_blocks = (
        mask.active[head][block.clamp(min=0)] if mask.is_toeplitz else mask.active[head][q // BLOCK, k // BLOCK]
    )
    chosen = torch.zeros(TOKENS, dtype=torch.bool)
    assert mask.columns is not None and mask.documents is not None
    chosen[[c for c in mask.columns[head].tolist() if c < TOKENS]] = True
    near = q - k < (mask.windows[head] if mask.windows else 0)
    same = mask.documents[q] == mask.documents[k]
    return (k <= q) & (same & (whole_blocks | near | chosen[None, :]) | (k < mask.anchors))


@pytest.mark.parametrize("backend", ["reference", "blockwise", "triton"])
@pytest.mark.parametrize(
    ("anchors", "toeplitz", "windows", "own"),
    [(1, True, False, True), (1, False, False, True), (3, True, True, False), (2, False, False, False)],
)
def test_every_document_attends_the_anchors(
    backend: str, anchors: int, toeplitz: bool, windows: bool, own: bool
) -> None:
    if backend == "triton":
        pytest.importorskip("triton")
        if torch.cuda.is_available():
            pytest.skip("the interpreter is for machines without a GPU")
    mask = problem(anchors=anchors, toeplitz=toeplitz, windows=windows, own=own)
    generator = torch.Generator().manual_seed(2)
    tensors = [torch.randn(1, TOKENS + PADDING, n, DIM, generator=generator, dtype=torch.float64)
               for n in (HEADS, HEADS, KV_HEADS, KV_HEADS)]  # fmt: skip
    for x in tensors:
        x[:, TOKENS:] = torch.nan
    grad_out, *leaves = tensors
    q, k, v = (x.detach().clone().requires_grad_() for x in leaves)
    out, lse = api.full_attention(q, k, v, mask, scale=SCALE, backend=backend)
    found = [out.detach(), *torch.autograd.grad(out, (q, k, v), grad_out)]
    plain = [x[:, :TOKENS].detach().clone().requires_grad_() for x in leaves]
    keys, values = (x.repeat_interleave(HEADS // KV_HEADS, dim=2) for x in plain[1:])
    scores = torch.einsum("bqhd,bkhd->bhqk", plain[0], keys) * SCALE
    allowed = torch.stack([pairs(mask, head) for head in range(HEADS)])
    empty = ~allowed.any(-1)
    scores = scores.masked_fill(~allowed, -torch.inf).masked_fill(empty[None, :, :, None], 0)
    weights = scores.softmax(-1) * ~empty[None, :, :, None]
    right = torch.einsum("bhqk,bkhd->bqhd", weights, values)
    wanted = [right.detach(), *torch.autograd.grad(right, plain, grad_out[:, :TOKENS])]
    for name, one, other in zip(("out", "dq", "dk", "dv"), found, wanted, strict=True):
        torch.testing.assert_close(one[:, :TOKENS], other, atol=1e-10, rtol=0, msg=name)
    torch.testing.assert_close(lse[0, :, :TOKENS][~empty], scores.logsumexp(-1)[0][~empty], atol=1e-10, rtol=0)
    without = AttentionMask(
        seq_len_tokens=TOKENS, block_size=BLOCK, active=mask.active, columns=mask.columns, documents=mask.documents,
        windows=mask.windows,
    )  # fmt: skip
    with torch.no_grad():
        bare = api.full_attention(q, k, v, without, scale=SCALE, backend=backend)[0]
    assert (bare[:, 41:TOKENS] - found[0][:, 41:TOKENS]).abs().max() > 1e-3, "the anchors do nothing"


@pytest.mark.parametrize("anchors", [1, 3])
def test_parts_are_disjoint_and_make_the_whole(anchors: int) -> None:
    mask, at = problem(anchors=anchors, toeplitz=True, windows=True, own=False), torch.arange(TOKENS)
    assert mask.columns is not None
    for head in range(HEADS):
        slots = mask.columns[head]
        of_columns = torch.zeros(TOKENS, TOKENS + 1, dtype=torch.bool)
        of_columns[:, slots.long()] = column_part(mask, head, at)
        blocks, columns = block_part(mask, head, at, at), of_columns[:, :TOKENS]
        assert not (blocks & columns).any()
        assert torch.equal(blocks | columns, whole(mask, head, at, at))
        assert torch.equal(whole(mask, head, at, at), pairs(mask, head))


def test_anchors_need_documents_and_columns() -> None:
    given = {"seq_len_tokens": 64, "block_size": 32, "active": torch.ones(1, 2, dtype=torch.bool)}
    columns = torch.tensor([[0, 64]], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"anchors: 1 need documents and as many columns, here 2"):
        AttentionMask(**given, columns=columns, anchors=1)
    with pytest.raises(ValueError, match=r"anchors: 3 need documents and as many columns, here 2"):
        AttentionMask(**given, columns=columns, documents=torch.zeros(64, dtype=torch.int32), anchors=3)
