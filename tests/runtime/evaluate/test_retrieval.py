"""What is planted, asked and counted: against a model that copies, one that cannot, and what stands in the text."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from eval_cases import byte_data, byte_model
from sparsering.kernels.select.sink_window import dense
from sparsering.runtime.data.shards import TokenData
from sparsering.runtime.data.writer import Tokenizer, byte_tokenizer
from sparsering.runtime.evaluate.evaluate import evaluate
from sparsering.runtime.evaluate.planting.sequence import Planted
from sparsering.runtime.evaluate.result import Cell, wilson
from sparsering.runtime.evaluate.retrieval import Series, ask, series_of
from sparsering.runtime.evaluate.settings import EvaluationSettings
from sparsering.traces.errors import InputError
from sparsering.traces.progress import no_progress

PLANTED: dict[str, Any] = {"tasks": ("needle", "tracking", "aggregation"), "needles": (1, 4), "keys": 6, "depths": 3}
SETTINGS = EvaluationSettings(seq_len_tokens=2048, lengths=(1024, 2048), chains=2, hops=3, **PLANTED)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TokenData:
    return byte_data(tmp_path_factory.mktemp("heldout"))


def sequence(series: Series, number: int = 0, tokenizer: Tokenizer | None = None) -> Planted:
    text = torch.full((series.length,), ord("~"))
    return series.sequence(number, text=text, tokenizer=tokenizer or byte_tokenizer(), seed=3)


def copied(arm: str, ids: Tensor, rows: Tensor) -> Tensor:
    """What a model says that has read the whole sequence, its answers as well."""
    best = torch.full_like(ids, -1)
    best[rows] = ids[rows + 1]
    return best


def counted(best: Any, data: TokenData, settings: EvaluationSettings = SETTINGS) -> tuple[Cell, ...]:
    return ask(best, ("dense",), data, byte_tokenizer(), settings, no_progress)


@pytest.mark.parametrize("series", series_of(SETTINGS), ids=lambda one: f"{one.task}-{one.planted}-{one.place}")
def test_sequences_have_their_length_and_one_answer_to_each_question(series: Series):
    made = sequence(series, 1)
    text = bytes(made.ids.tolist()).decode()
    assert len(text) == series.length
    for one in made.answers:
        answer, question = text[one.first : one.first + one.tokens], text[: one.first].rpartition("\n")[2]
        before = text[: one.first - len(question)]
        if series.task == "needle":
            assert before.count(f"{question}{answer}.") == 1 and before.count(question) == 1
        elif series.task == "tracking":
            variable, value = question.split()[-2], answer
            while (told := before.partition(f"VAR {variable} =")[2].partition(".")[0].strip()).startswith("VAR"):
                variable = told.removeprefix("VAR ")
            assert told == value.strip()
        else:
            (word, _), *_ = Counter(before.partition("A list of words:")[2].split()).most_common()
            assert word == answer.strip()


@pytest.mark.parametrize("series", series_of(SETTINGS), ids=lambda one: f"{one.task}-{one.planted}-{one.place}")
def test_questions_stand_last_or_in_mid_document(series: Series):
    made = sequence(series)
    end = made.answers[-1].first + made.answers[-1].tokens
    if series.place == "last":
        assert end == series.length
    else:
        assert series.length - end >= 256
        assert bytes(made.ids[end:].tolist()) == b"~" * (series.length - end), "ordinary text follows"
        assert made.answers[0].first > series.length // 2 - 100


def test_needles_lie_in_the_range_of_depths_that_they_are_counted_in():
    series = next(one for one in series_of(SETTINGS) if one.task == "needle" and one.planted == 4)
    made = sequence(series, 2)
    text = bytes(made.ids.tolist()).decode()
    begin = min(text.rindex("\n", 0, one.first) for one in made.answers)
    ordinary = text[:begin].count("~")
    for one in made.answers:
        question = text[: one.first].rpartition("\n")[2]
        before = text[: text.index(question)].count("~")
        assert one.depth is not None and one.depth / 3 - 0.01 <= before / ordinary <= (one.depth + 1) / 3 + 0.01
    assert [one.depth for one in sorted(made.answers, key=lambda one: text.index(text[: one.first].rpartition("\n")[2]))
            ] == sorted(one.depth or 0 for one in made.answers)  # fmt: skip


def test_the_same_seed_plants_the_same():
    for series in series_of(SETTINGS):
        assert torch.equal(sequence(series, 3).ids, sequence(series, 3).ids)
        assert not torch.equal(sequence(series, 3).ids, sequence(series, 4).ids)


def test_a_model_that_copies_finds_everything_and_every_cell_has_its_keys(data: TokenData):
    cells = counted(copied, data)
    assert all((one.found, one.share, one.high) == (one.asked, 1.0, 1.0) for one in cells)
    assert all(one.asked >= 6 for one in cells)
    assert len(cells) == 2 * 2 * (3 + 3 + 1 + 1), "lengths, places, depths of two numbers of needles, two tasks without"
    kinds = {(one.task, one.planted, one.length_tokens, one.question, one.depth_from) for one in cells}
    assert len(kinds) == len(cells)


def test_an_answer_counts_only_where_all_its_tokens_are_right(data: TokenData):
    spoilt: Counter[str] = Counter()

    def last_digit_wrong(arm: str, ids: Tensor, rows: Tensor) -> Tensor:
        best = copied(arm, ids, rows)
        spoilt["sequences"] += 1
        if spoilt["sequences"] % 2:
            best[rows[-1]] = 0  # of the last answer
        return best

    settings = EvaluationSettings(seq_len_tokens=1024, lengths=(1024,), tasks=("needle",), needles=(2,), depths=1,
                                  keys=8)  # fmt: skip
    cells = counted(last_digit_wrong, data, settings)
    assert [(one.asked, one.found) for one in cells] == [(8, 6), (8, 6)]
    assert [one.low for one in cells] == [wilson(6, 8)[0]] * 2


def test_the_first_token_of_an_answer_is_judged_by_the_questions_last(data: TokenData):
    made = sequence(series_of(SETTINGS)[0])
    first = made.answers[0].first
    best = torch.full_like(made.ids, -1)
    best[first - 1 : first - 1 + made.answers[0].tokens] = made.ids[first : first + made.answers[0].tokens]
    assert made.found(best) == [True]
    assert made.found(best.roll(1)) == [False]


def test_intervals_are_wilsons():
    low, high = wilson(5, 50)
    assert (low, high) == (pytest.approx(0.0435, abs=1e-4), pytest.approx(0.2136, abs=1e-4))  # published tables
    assert wilson(0, 50)[0] == 0 and wilson(0, 50)[1] == pytest.approx(0.0714, abs=1e-4)


def test_whole_models_are_asked_in_both_arms(data: TokenData):
    settings = EvaluationSettings(seq_len_tokens=1024, lengths=(1024,), block_size=64, tasks=("needle",), needles=(4,),
                                  keys=2, depths=2)  # fmt: skip
    result = evaluate(byte_model(), data, dense(1024), settings)
    assert {one.arm for one in result.cells} == {"dense", "sparse"}
    assert (result.needle_last, result.needle_mid) == (0.0, 0.0), "random weights find nothing"
    assert result.heldout_loss is None and result.readings == ()


def test_other_tokens_than_bytes_need_their_tokenizer(data: TokenData):
    """Ids and words of a vocabulary of another size than the data's are refused."""
    with pytest.raises(InputError, match="has 300 tokens, that of the data 256"):
        evaluate(byte_model(), data, None, SETTINGS, tokenizer=Tokenizer("other", 300, None, lambda text: [1] * 9))


def test_words_of_several_tokens_are_answered_whole(tmp_path: Path):
    """A tokenizer of pairs of bytes: answers and needles have the same tokens."""
    pairs = Tokenizer("pairs", 1 << 14, None, lambda text: [ord(a) * 128 + ord(b) for a, b in zip(
        text[::2], text[1::2].ljust(len(text[::2])), strict=True)])  # fmt: skip
    for series in series_of(SETTINGS):
        made = sequence(series, tokenizer=pairs)
        for one in made.answers:
            answer = made.ids[one.first : one.first + one.tokens].tolist()
            text = made.ids[: one.first].tolist()
            assert any(text[place : place + len(answer)] == answer for place in range(len(text)))
