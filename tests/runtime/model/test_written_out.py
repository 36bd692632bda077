"""Attention that a class writes out: recognised where it is plain, with scale and what is added to keys; or refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sparsering.runtime.model.calls.placing import Placing, uncounted_token
from sparsering.runtime.model.calls.positions import PositionGuard
from sparsering.runtime.model.calls.written_out import WrittenOut
from sparsering.runtime.model.head_sizes import biased, falling
from sparsering.traces.errors import UnsupportedError

B, H, S, D = 2, 3, 5, 8
Written = Callable[[Tensor, Tensor, Tensor], Any]


def run(written: Written) -> tuple[Tensor, list[tuple[Any, ...]]]:
    """Return what a way to write attention gives, and what it asked for: q, k, v, scale, slopes."""
    asked: list[tuple[Any, ...]] = []

    def attention(*given: Any) -> Tensor:
        asked.append(given)
        assert isinstance(given[0] @ given[1].transpose(-1, -2), Tensor), "attention's own products are left alone"
        return given[2].transpose(1, 2) * 2

    q, k, v = torch.randn(3, B, H, S, D, dtype=torch.float64)
    with WrittenOut(H, attention):
        out = written(q, k, v)
    torch.testing.assert_close(out.reshape(B, H, S, D), 2 * v)
    torch.testing.assert_close(asked[0][0], q)
    torch.testing.assert_close(asked[0][1], k)
    return out, asked


def with_matmul(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.matmul(q, k.transpose(-1, -2)) / math.sqrt(D)
    scores = scores + torch.zeros(B, 1, S, S)
    weights = torch.nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
    return torch.matmul(torch.nn.functional.dropout(weights, p=0.3, training=False), v)


def with_bmm(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.reshape(B * H, S, D) for x in (q, k, v))
    scores = torch.bmm(q, k.transpose(1, 2)).view(B, H, S, S) * D**-0.5
    scores = torch.max(scores.masked_fill(torch.ones(S, S, dtype=torch.bool), -1e9), torch.tensor(-1e9))
    return torch.bmm(torch.softmax(scores.view(B * H, S, S), dim=2), v)


def with_baddbmm(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.reshape(B * H, S, D) for x in (q, k, v))
    scores = torch.baddbmm(torch.zeros(B * H, S, S, dtype=q.dtype), q, k.transpose(1, 2), alpha=D**-0.5)
    return scores.softmax(-1) @ v


@pytest.mark.parametrize("written", [with_matmul, with_bmm, with_baddbmm])
def test_plain_attention_is_asked_for_with_its_scale(written: Written) -> None:
    _, asked = run(written)
    assert len(asked) == 1 and asked[0][3] == pytest.approx(D**-0.5) and asked[0][4] is None


def test_what_grows_with_the_key_is_a_slope_of_each_head() -> None:
    slopes = torch.tensor([0.5, 0.25, 0.125], dtype=torch.float64)
    alibi = (slopes[:, None, None] * torch.arange(S)).repeat(B, 1, 1)

    def written(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.reshape(B * H, S, D) for x in (q, k, v))
        return alibi.baddbmm(q, k.transpose(1, 2), beta=1.0, alpha=0.3).softmax(-1) @ v

    _, asked = run(written)
    torch.testing.assert_close(asked[0][4], slopes.repeat(B))


@pytest.mark.parametrize(
    ("after", "told"),
    [
        (lambda scores, v: torch.exp(scores), "exp of attention scores is not supported"),
        (lambda scores, v: scores + 1.0, "something is added to scores"),
        (lambda scores, v: scores * torch.ones(3), "scaled by something that is no number"),
        (lambda scores, v: scores.softmax(-2), "softmax of attention scores: over dimension -2"),
        (lambda scores, v: scores @ v, "before they are weights"),
        (lambda scores, v: scores.softmax(-1).masked_fill(None, 0.0), "masked after the softmax"),
        (lambda scores, v: torch.nn.functional.dropout(scores.softmax(-1), 0.1), "dropout: is 0.1"),
        (lambda scores, v: scores.view(B * H * S, S), "attention scores: of shape"),
    ],
)
def test_anything_else_is_one_line(after: Callable[[Any, Tensor], Any], told: str) -> None:
    with pytest.raises(UnsupportedError, match=told):
        run(lambda q, k, v: after(torch.matmul(q, k.transpose(-1, -2)), v))


@pytest.mark.parametrize(("dtype", "room"), [(torch.float64, 1e-12), (torch.bfloat16, 2e-3)])
def test_slopes_and_biases_are_added_to_scores(dtype: torch.dtype, room: float) -> None:
    """Far along a sequence too: differences between keys nearby are what a softmax sees."""
    positions = torch.arange(40_000, 40_000 + S)[None]
    slopes, scale = torch.tensor([0.7, 0.3, 0.011], dtype=torch.float64), D**-0.5
    q, k = torch.zeros(2, 1, H, S, D, dtype=dtype)
    of_q, of_k = falling(q, k, slopes=slopes, scale=scale, positions=positions, seq_len_tokens=1 << 16)
    scores = scale * (of_q.double() @ of_k.double().transpose(-1, -2))
    wanted = slopes[:, None] * torch.arange(S)
    torch.testing.assert_close(scores[0, :, 0] - scores[0, :, 0, :1], wanted, rtol=room, atol=room)
    bias = torch.randn(1, H, S, dtype=torch.float64).to(dtype)
    of_q, of_k = biased(q, k, bias=bias, scale=scale)
    scores = scale * (of_q.double() @ of_k.double().transpose(-1, -2))
    torch.testing.assert_close(scores[0, :, 0], bias[0].double(), rtol=room, atol=room)


@pytest.mark.parametrize(("dtype", "most"), [(torch.bfloat16, 65_536), (torch.float16, 524_288)])
def test_positions_that_would_be_rounded_are_refused(dtype: torch.dtype, most: int) -> None:
    q, k = torch.zeros(2, 1, H, 2, D, dtype=dtype)
    positions, slopes = torch.tensor([[most - 2, most - 1]]), torch.full((H,), 2.0**-8)
    of_q, of_k = falling(q, k, slopes=slopes, scale=1.0, positions=positions, seq_len_tokens=most)
    scores = (of_q.double() @ of_k.double().transpose(-1, -2))[0, 0, 0]
    assert scores.tolist() == [(most - 2) * 2.0**-8, (most - 1) * 2.0**-8]
    with pytest.raises(UnsupportedError, match=f"of {most + 1} tokens would be rounded in torch"):
        falling(q, k, slopes=slopes, scale=1.0, positions=positions, seq_len_tokens=most + 1)


class Counting(torch.nn.Module):
    """Embeddings that number tokens but for one, as RoBERTa's do."""

    padding_idx = 1

    def create_position_ids_from_input_ids(self) -> None:
        """Only its name counts here."""

    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None) -> Tensor | None:
        return position_ids


def test_positions_begin_after_the_token_that_is_not_counted_and_that_token_is_refused() -> None:
    body = Counting()
    assert uncounted_token(body) == (1, 2)
    placing, positions = Placing(body, body), torch.tensor([[4, 5, 9]])
    _, given = placing.place(body, (), {"position_ids": positions})
    assert given["position_ids"].tolist() == [[6, 7, 11]]
    guard = PositionGuard(positions[0])
    for ids, seq_len_tokens, right in (([3, 1, 4], 10, False), ([3, 2, 4], 10, True), ([3, 2, 1], 9, True)):
        found = placing.uncounted_in({"input_ids": torch.tensor([ids]), "position_ids": positions}, seq_len_tokens)
        if right:
            guard.check(positions, found)
        else:
            with pytest.raises(UnsupportedError, match="has padding"):
                guard.check(positions, found)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_bias_of_keys_that_does_not_rise_evenly_is_refused(dtype: torch.dtype) -> None:
    row = (torch.tensor([0.5, 0.0625, 0.7071])[:, None] * torch.arange(S)).to(dtype)

    def written(bias: Tensor) -> Written:
        return lambda q, k, v: (q @ k.transpose(-1, -2) + bias[:, None]).softmax(-1) @ v

    _, asked = run(written(row))
    torch.testing.assert_close(asked[0][4], row[:, 1])
    for bent in (row.clamp(max=1.5), row + (torch.arange(S) > 3), row.sqrt()):
        with pytest.raises(UnsupportedError, match="does not rise evenly"):
            run(written(bent.to(dtype)))
