"""Evaluations on the page: what it says of them first, what it draws, what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from report_files import called, evaluation, invoke
from sparsering.simulator.report.evaluation import Evaluation, short_tokens
from sparsering.simulator.report.figures.evaluation import needle_figure, position_figure, reach_figure
from sparsering.simulator.report.parts.evaluation import _loss_lines, evaluation_part
from sparsering.traces.files import write_json

READ = Evaluation.model_validate(evaluation())


def drawn(figure: Any) -> list[Any]:
    """What a figure draws, in order."""
    return list(figure.data)


def without(*quantities: str) -> list[dict[str, Any]]:
    return [one for one in evaluation()["readings"] if one["quantity"] not in quantities]


def test_the_first_sentence_is_what_was_found():
    assert READ.sentence == (
        "sink-window, 2,048 tokens: held-out loss 2.7500 nats a token with sink-window, 2.5000 with dense attention; "
        "the context cut changes the loss by +0.0602 nats from token 1,024 on, more than two standard errors; needles "
        "found: 74% asked last, 74% asked in mid-document."
    )
    dense = evaluation(
        selector=None, arm="dense", heldout_loss=2.5, needle_last=None, readings=without("cut_minus_whole")
    )
    sentence = Evaluation.model_validate(dense).sentence
    assert sentence == "dense, 2,048 tokens: held-out loss 2.5000 nats a token, with dense attention."


def test_a_page_of_evaluations_alone(tmp_path: Path):
    write_json(tmp_path / "eval.json", evaluation(arm="window <1>"))
    told = json.loads(called("report", tmp_path / "eval.json", "-o", tmp_path / "page.html", "--json"))
    assert told["parts"] == ["evaluation"] and told["sentence"].startswith("window <1>, 2,048 tokens")
    text = (tmp_path / "page.html").read_text()
    assert "window <1>" not in text and "window &lt;1&gt;" in text
    figures = ("loss", "cut_minus_whole", "kl", "needle-1-last-dense", "needle-1-mid-sparse", "reach-1024")
    assert all(f'data-figure="figure-eval-0-{name}"' in text for name in figures)
    assert "reach-8192" not in text, "no key has queries so far away"
    assert "<td>variable tracking</td>" in text and "25 % (15 % to 38 %)" in text


def test_curves_have_the_means_and_two_standard_errors():
    lines = drawn(position_figure(list(_loss_lines(READ)), "nats"))
    names = ["dense attention", "dense attention, context cut", "sparse attention", "sparse attention, context cut"]
    assert [line.name for line in lines] == names
    first = lines[0]
    assert (list(first.x), list(first.y)) == (["0–1K", "1K–2K"], pytest.approx([2.5, 2.51024]))
    assert list(first.error_y.array) == pytest.approx([0.04, 0.04])


def test_needle_maps_have_a_row_a_depth_a_column_a_length_and_counts():
    cells = [one for one in READ.cells if one.task == "needle" and (one.arm, one.question) == ("dense", "mid")]
    heat, *texts = drawn(needle_figure(cells))
    assert [list(row) for row in heat.z] == [[0.74, 0.74], [0.74, 0.74]]
    assert (list(heat.x), list(heat.y)) == (["1K", "2K"], ["0%–50%", "50%–100%"])
    assert [text.text[0] for text in texts] == ["37/50"] * 4


def test_reach_is_a_map_of_layers_and_heads():
    (heat,) = drawn(reach_figure(READ.reach, "1024"))
    assert [list(row) for row in heat.z] == [pytest.approx([0.0, 0.1, 0.2, 0.3])] * 2
    part = evaluation_part([(Path("e"), READ)])
    assert part is not None
    titles = [one["title"] for one in part.values["groups"][0]["reach"]]
    assert titles == ["Share of keys that no query more than 1,024 tokens later attends"]


@pytest.mark.parametrize(("field", "value"), [("seq_len", 0), ("arm", None), ("heldout_loss", "x")])
def test_a_damaged_evaluation_is_one_line(tmp_path: Path, field: str, value: Any):
    write_json(tmp_path / "eval.json", evaluation(**{field: value}))
    result = invoke("report", tmp_path / "eval.json", "-o", tmp_path / "page.html")
    assert result.exit_code == 2
    assert f"eval.json: {field}: " in result.stderr and result.stderr.count("\n") == 1
    assert not (tmp_path / "page.html").exists()


def test_lengths_are_short():
    assert [short_tokens(tokens) for tokens in (0, 512, 1024, 1536, 8192, 131072, 1 << 20)] == [
        "0", "512", "1K", "1,536", "8K", "128K", "1M",
    ]  # fmt: skip
