"""Losses, agreement and densities of `evaluate`, held against plain transformers and plain definitions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from eval_cases import byte_data, byte_model
from sparsering.kernels.select.registry import Selector
from sparsering.kernels.select.sink_window import SinkWindow, dense
from sparsering.runtime.data.shards import TokenData
from sparsering.runtime.evaluate.evaluate import evaluate
from sparsering.runtime.evaluate.heldout import drawn, pieces, text_of
from sparsering.runtime.evaluate.result import Evaluation, Reading, read_evaluation
from sparsering.runtime.evaluate.settings import Documents, EvaluationSettings
from sparsering.traces.errors import InputError

TOKENS = 512


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TokenData:
    return byte_data(tmp_path_factory.mktemp("heldout"))


@pytest.fixture(scope="module")
def model() -> Any:
    return byte_model()


def evaluated(model: Any, data: TokenData, selector: Selector | None = None, **changes: Any) -> Evaluation:
    settings: dict[str, Any] = {
        "seq_len_tokens": TOKENS, "sequences": 3, "block_size": 64, "cut_context_tokens": 0, "seed": 5, **changes,
    }  # fmt: skip
    return evaluate(model, data, selector, EvaluationSettings(**settings))


def own_losses(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """The losses [S - 1] of transformers' own attention and logits."""
    with torch.no_grad():
        logits = model(input_ids=ids[None]).logits[0, :-1]
    return torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none")


def reading(result: Evaluation, quantity: str, arm: str) -> Reading:
    found = result.reading(quantity, arm)
    assert found is not None
    return found


def test_dense_loss_is_the_models_own(model: Any, data: TokenData):
    result = evaluated(model, data)
    sequences = drawn(data, count=3, seq_len_tokens=TOKENS, seed=5)
    losses = torch.stack([own_losses(model, torch.from_numpy(one.tokens)) for one in sequences])
    loss = reading(result, "loss", "dense")
    assert loss.mean == pytest.approx(losses.mean().item(), abs=1e-5)
    assert loss.tokens == 3 * (TOKENS - 1)
    assert loss.error == pytest.approx(losses.mean(1).std().item() / 3**0.5, rel=1e-3)
    assert (result.heldout_loss, result.heldout_loss_dense, result.selector) == (loss.mean, loss.mean, None)
    assert result.attention == {"dense": ("torch scaled_dot_product_attention",)}


def test_buckets_add_up_to_the_whole(model: Any, data: TokenData):
    result = evaluated(model, data, seq_len_tokens=1200, sequences=2)
    loss = reading(result, "loss", "dense")
    assert [(one.first, one.until, one.tokens) for one in loss.buckets] == [(0, 1024, 2048), (1024, 2048, 350)]
    assert sum(one.tokens * one.mean for one in loss.buckets) == pytest.approx(loss.tokens * loss.mean, rel=1e-12)


def test_a_selector_that_covers_everything_is_dense(model: Any, data: TokenData):
    result = evaluated(model, data, dense(TOKENS), tasks=("loss", "agreement", "reach"), far_tokens=(100, 600))
    assert reading(result, "loss", "sparse").mean == pytest.approx(reading(result, "loss", "dense").mean, abs=1e-5)
    assert reading(result, "kl", "sparse").mean == pytest.approx(0, abs=1e-6)
    assert reading(result, "top_1", "sparse").mean > 0.999
    assert result.total_density == 1
    assert [one.unattended for one in result.reach] == [{"100": (0.0,) * 4, "600": None}] * 2
    assert all(mass == pytest.approx(1, abs=1e-5) for one in result.reach for mass in one.kept_mass or ())


def test_a_narrow_window_costs_loss_and_agreement(model: Any, data: TokenData):
    narrow = SinkWindow(sink_tokens=0, window_tokens=1)
    result = evaluated(model, data, narrow, tasks=("loss", "agreement", "reach"), far_tokens=(100,))
    difference = reading(result, "loss_minus_dense", "sparse")
    losses = [reading(result, "loss", arm).mean for arm in ("sparse", "dense")]
    assert difference.mean == pytest.approx(losses[0] - losses[1], abs=1e-9)
    assert reading(result, "kl", "sparse").mean > 0.01
    assert result.reach[0].unattended == {"100": (1.0,) * 4}
    assert result.total_density == pytest.approx(8 / 36)
    assert result.attention["sparse"] == ("blockwise",)
    assert result.heldout_loss == losses[0]
    alone = evaluated(model, data, narrow, dense_too=False)
    assert alone.heldout_loss == pytest.approx(losses[0], abs=1e-9)
    assert alone.heldout_loss_dense is None


def test_agreement_is_the_divergence_of_the_models_own_distributions(model: Any, data: TokenData):
    """The sparse side is a model that plain transformers runs on the last 64 tokens alone."""
    selector = SinkWindow(sink_tokens=0, window_tokens=1)
    result = evaluated(model, data, selector, tasks=("agreement",), seq_len_tokens=64, sequences=4)
    assert reading(result, "kl", "sparse").mean == pytest.approx(0, abs=1e-6), "one block: nothing is left out"
    whole = evaluated(model, data, selector, tasks=("agreement",), seq_len_tokens=128, sequences=1)
    ids = torch.from_numpy(drawn(data, count=1, seq_len_tokens=128, seed=5)[0].tokens)
    with torch.no_grad():
        p = model(input_ids=ids[None]).logits[0].log_softmax(-1)
        blocks = [model(input_ids=part[None], position_ids=at[None]).logits[0]
                  for part, at in zip(ids.split(64), torch.arange(128).split(64), strict=True)]  # fmt: skip
    q = torch.cat(blocks).log_softmax(-1)
    expected = (p.exp() * (p - q)).sum(-1)[:-1].mean().item()
    assert reading(whole, "kl", "sparse").mean == pytest.approx(expected, rel=1e-4)


def test_cut_context_is_the_loss_of_pieces(model: Any, data: TokenData):
    result = evaluated(model, data, cut_context_tokens=128, sequences=2, seq_len_tokens=400)
    expected = []
    for sequence in drawn(data, count=2, seq_len_tokens=400, seed=5):
        ids = torch.from_numpy(sequence.tokens)
        losses = torch.full((399,), torch.nan)
        for first in range(0, 400, 64):
            part = own_losses(model, ids[first : first + 129])  # one more token, which is only predicted
            counted = slice(0 if first == 0 else 64, 128)
            target = losses[first : first + 128][counted]
            target.copy_(part[counted][: target.shape[0]])
            if first + 128 >= 400:
                break
        expected.append(losses)
    whole = torch.stack(expected)
    assert not whole.isnan().any()
    assert reading(result, "cut_loss", "dense").mean == pytest.approx(whole.mean().item(), abs=1e-5)
    difference = reading(result, "cut_minus_whole", "dense").mean
    assert difference == pytest.approx(whole.mean().item() - reading(result, "loss", "dense").mean, abs=1e-5)


@pytest.mark.parametrize("tokens", [1, 7, 8, 9, 12, 13, 40, 41])
def test_pieces_count_every_token_once_with_enough_before_it(tokens: int):
    counted: list[int] = []
    for first, until, start in pieces(tokens, 8):
        assert until - first <= 8
        for token in range(start, until):
            seen = token - first
            assert seen == token or 4 <= seen < 8
            counted.append(token)
    assert counted == list(range(tokens))


def test_document_ends_count_as_asked(model: Any, data: TokenData):
    plain = drawn(data, count=1, seq_len_tokens=2048, seed=5)[0]
    starts = [place for place in range(1, 2048) if plain.documents[place] != plain.documents[place - 1]]
    assert len(starts) > 1
    asked = text_of(plain, Documents(loss=True, positions=True))
    assert all(asked.labels[start - 1] == -100 for start in starts)
    assert int((asked.labels == -100).sum()) == len(starts) + 1
    assert [int(asked.positions[place]) for place in (0, starts[0] - 1, starts[0], starts[0] + 3)] == [
        0, starts[0] - 1, 0, 3,
    ]  # fmt: skip
    assert asked.documents is None and torch.equal(asked.seen, torch.arange(2048))
    piece = asked.piece(starts[0] - 10, starts[0] + 10)
    assert piece.positions.tolist() == [*range(10), *range(10)]
    result = evaluated(model, data, documents=Documents(loss=True, positions=True))
    assert reading(result, "loss", "dense").tokens < 3 * (TOKENS - 1)


def test_documents_kept_apart_are_the_documents_alone(tmp_path: Path):
    model, data = byte_model(dtype=torch.float64), byte_data(tmp_path, size=190)
    apart = Documents(loss=True, positions=True, attention=True)
    result = evaluated(model, data, documents=apart, sequences=1)
    sequence = drawn(data, count=1, seq_len_tokens=TOKENS, seed=5)[0]
    ids, documents = torch.from_numpy(sequence.tokens), torch.from_numpy(sequence.documents)
    losses = torch.cat([own_losses(model, ids[documents == one]) for one in documents.unique()])
    assert reading(result, "loss", "dense").mean == pytest.approx(losses.mean().item(), rel=1e-9)
    with pytest.raises(InputError, match="does not choose per document"):
        from sparsering.kernels.select.shifted_groups import ShiftedGroups

        evaluated(model, data, ShiftedGroups(group_tokens=256), documents=apart)


def test_the_model_is_left_as_it_was(model: Any, data: TokenData):
    before = model.config._attn_implementation
    model.train()
    evaluated(model, data, dense(TOKENS))
    assert model.training and model.config._attn_implementation == before
    model.eval()
    assert not any(hasattr(module, "_sparsering") for module in model.modules())


def test_windows_of_the_model_stay(data: TokenData):
    """Layers that the model limits itself keep their own window, in both arms."""
    model = byte_model("mistral", sliding_window=32, dtype=torch.float64)
    result = evaluated(model, data, SinkWindow(sink_tokens=0, window_tokens=1), sequences=1)
    ids = torch.from_numpy(drawn(data, count=1, seq_len_tokens=TOKENS, seed=5)[0].tokens)
    expected = own_losses(model, ids).mean().item()
    assert reading(result, "loss", "dense").mean == pytest.approx(expected, rel=1e-9)
    assert reading(result, "loss", "sparse").mean == pytest.approx(expected, rel=1e-9)
    assert result.total_density is None, "nothing was chosen"


def test_results_are_read_as_they_were_written(model: Any, data: TokenData, tmp_path: Path):
    result = evaluated(model, data, dense(TOKENS), tasks=("loss", "agreement", "reach"))
    path = tmp_path / "eval.json"
    path.write_text(result.model_dump_json())
    assert read_evaluation(path) == result
    assert result.row()["heldout_loss"] == result.heldout_loss
    path.write_text(result.model_dump_json().replace('"seed":5', '"seed":"x"'))
    with pytest.raises(InputError, match=r"eval.json: seed"):
        read_evaluation(path)
    path.write_text('{"kind": "other"}')
    with pytest.raises(InputError, match="is no evaluation"):
        read_evaluation(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": ("los",)}, "'los' is not one of"),
        ({"tasks": ()}, "tasks"),
        ({"tasks": ("agreement",)}, "give a selector"),
        ({"tasks": ("reach",)}, "give a selector"),
        ({"sequences": 99}, "holds .* of 512 tokens"),
        ({"seq_len_tokens": 1 << 20}, "a sequence has 1048576"),
        ({"cut_context_tokens": 7}, "must be even"),
        ({"tasks": ("needle",), "lengths": (256,)}, "is not from 512"),
        ({"tasks": ("needle",), "lengths": (512,), "needles": (9,)}, "do not fit"),
        ({"needles": (1, 1)}, "different numbers"),
    ],
)
def test_what_makes_no_sense_is_refused(model: Any, data: TokenData, changes: dict[str, Any], message: str):
    with pytest.raises(InputError, match=message):
        evaluated(model, data, **changes)


def test_a_model_of_fewer_tokens_is_refused(data: TokenData):
    with pytest.raises(InputError, match="has a vocabulary of 256, the model of 97"):
        from tiny_models import tiny_model

        evaluated(tiny_model("llama"), data)
