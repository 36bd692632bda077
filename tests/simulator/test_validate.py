"""`sparsering validate`: its figures worked by hand, its tolerances, its page."""

from __future__ import annotations

import json
import re
from dataclasses import astuple, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import kendalltau

from browser import drawn, opened
from fidelity_cases import ALTERNATIVES, MEASURED, SIMULATED, WORKLOAD, fidelity, invoke, steps, timeline, written
from sparsering.simulator.comparisons import Comparison
from sparsering.simulator.validate import errors_of, judge, parse_tolerances


def told(*arguments: object) -> dict[str, Any]:
    result = invoke(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def row(measured: float, predicted: float, **fields: Any) -> Comparison:
    given = {"quantity": "step", "source": "s", "configuration": f"{measured}", "group": "g", "spread": 0.0} | fields
    return Comparison(measured=measured, predicted=predicted, **given)


def test_errors_by_hand() -> None:
    rows = [row(measured, predicted) for measured, predicted in ALTERNATIVES.values()]
    found = errors_of(rows)
    # sizes 0, 4, 10, 20, 50 %: the 95th percentile lies 0.8 of the way from the fourth to the fifth
    assert found is not None
    assert astuple(found) == pytest.approx((5, 0.1, 0.44, 0.5, 0.0))
    assert errors_of([]) is None


def test_tau_and_regret_by_hand(tmp_path: Path) -> None:
    step = told(written(tmp_path / "f.json", fidelity(*steps())))["quantities"]["step"]
    # Of ten pairs all lie more than 3 % apart: c and d tie in their prediction, b and c, b and d are out of order.
    assert (step["pairs"], step["tau"]) == (10, pytest.approx((7 - 2) / 10))
    (choice,) = step["choices"]
    assert (choice["picked"], choice["best"], choice["regret"]) == ("a", "a", 0.0)


def test_pairs_within_three_spreads_have_no_order(tmp_path: Path) -> None:
    rows = [one | {"spread": 0.02} for one in steps()]
    step = told(written(tmp_path / "f.json", fidelity(*rows)))["quantities"]["step"]
    # c and d are 4.2 % apart, which is less than 6 %: that pair, a tie, goes.
    assert (step["pairs"], step["tau"]) == (9, pytest.approx((7 - 2) / 9))


def test_tau_is_scipys_where_every_pair_counts() -> None:
    generator = np.random.default_rng(3)
    measured, predicted = generator.uniform(1, 2, size=(2, 30))
    rows = [row(float(a), float(b)) for a, b in zip(measured, predicted, strict=True)]
    verdict = judge(rows)["step"]
    assert verdict.pairs == 30 * 29 // 2
    assert verdict.tau == pytest.approx(kendalltau(measured, predicted)[0])


def test_the_regret_of_a_wrong_pick_and_of_a_tie() -> None:
    wrong = [row(100.0, 130.0), row(125.0, 110.0)]
    assert judge(wrong)["step"].regret == pytest.approx(0.25)
    tie = [row(100.0, 110.0), row(140.0, 110.0)]
    assert judge(tie)["step"].regret == pytest.approx(0.4)  # the prediction does not tell which


def test_workloads_and_files_are_not_mixed() -> None:
    rows = [row(100.0, 130.0), row(125.0, 110.0, group="h"), row(50.0, 300.0, source="t"), row(40.0, 200.0, group=None)]
    verdict = judge(rows)["step"]
    assert (verdict.pairs, verdict.tau, verdict.regret) == (0, None, None)
    assert verdict.errors is not None and verdict.errors.rows == 4


def test_a_configuration_that_was_measured_twice_is_no_alternative_to_itself() -> None:
    rows = [row(100.0, 130.0, configuration="x"), row(125.0, 110.0, configuration="x")]
    assert judge(rows)["step"].choices == ()
    assert judge([*rows, row(200.0, 220.0, configuration="y")])["step"].pairs == 2


def test_calibration_is_counted_apart() -> None:
    rows = [row(100.0, 130.0), row(125.0, 110.0)]
    alone = judge(rows)["step"]
    mixed = judge([*rows, row(10.0, 10.0, calibration=True), row(20.0, 1.0, calibration=True)])["step"]
    assert replace(mixed, calibration=None) == alone
    assert mixed.calibration is not None and (mixed.calibration.rows, mixed.calibration.max) == (2, 0.95)
    only = judge([row(10.0, 10.0, calibration=True)])["step"]
    assert only.errors is None
    (tolerance,) = parse_tolerances("step=1")
    assert tolerance.missed({"step": only}) == "step.median: nothing to judge it by"


@pytest.mark.parametrize(
    ("tolerance", "missed"),
    [
        ("step=0.1001,step.p95=0.45,step.max=0.51,step.bias=0.001,step.tau=0.5,step.regret=0", []),
        ("step.median=0.09", ["step.median: 10.00% is above 9.00%"]),
        ("step.p95=0.4, step.tau=0.6", ["step.p95: 44.00% is above 40.00%", "step.tau: 0.500 is below 0.6"]),
        ("memory=1", ["memory.median: nothing to judge it by"]),
    ],
)
def test_tolerances(tolerance: str, missed: list[str], tmp_path: Path) -> None:
    path = written(tmp_path / "f.json", fidelity(*steps()))
    result = invoke(path, "--tolerance", tolerance)
    assert result.stderr.splitlines() == [f"missed: {line}" for line in missed]
    assert result.exit_code == bool(missed)
    document = invoke(path, "--tolerance", tolerance, "--json")
    assert json.loads(document.stdout)["missed"] == missed


def test_a_bias_is_bounded_on_both_sides() -> None:
    (tolerance,) = parse_tolerances("step.bias=0.05")
    assert tolerance.missed(judge([row(100.0, 90.0)])) == "step.bias: 10.00% is above 5.00%"
    assert tolerance.missed(judge([row(100.0, 110.0)])) == "step.bias: 10.00% is above 5.00%"


@pytest.mark.parametrize("text", ["walk=1", "step.mean=1", "step", "step=soon", "step=-1", "step=nan", "step=inf"])
def test_a_tolerance_that_says_nothing_is_refused(text: str, tmp_path: Path) -> None:
    result = invoke(written(tmp_path / "f.json", fidelity(*steps())), "--tolerance", text)
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert result.stderr.startswith("sparsering: --tolerance: ")


def layer(**changes: Any) -> dict[str, Any]:
    """A row as ring.py and rank.py write it."""
    return {
        "impl": "ours-triton", "layout": "stripedx1 ring", "transport": "p2p", **WORKLOAD, "kv_heads": 2,
        "mask": "slash", "density": 0.05, "forward_ms": 2.0, "backward_ms": 5.0, "step_ms": 6.0,
        "peak_bytes": 1000, "predicted_peak_bytes": 1100, "predicted_forward_ms": 1.8, "predicted_backward_ms": 4.5,
    } | changes  # fmt: skip


def test_rings_are_compared_by_their_predicted_fields(tmp_path: Path) -> None:
    dense = {"impl": "dense-zigzag", "layout": "ring", "forward_ms": 9.0, "backward_ms": 9.0}
    no_peak = layer(layout="stripedx1 gather", peak_bytes=None, step_ms=5.0)
    document = {"benchmark": "ring", "rows": [dense, layer(), no_peak]}
    found = told(written(tmp_path / "r.json", document))["quantities"]
    assert {name: one["errors"]["rows"] for name, one in found.items()} == {
        "forward": 2, "backward": 2, "step": 2, "memory": 1,
    }  # fmt: skip
    assert found["forward"]["errors"]["bias"] == pytest.approx(-0.1)
    assert found["memory"]["errors"]["bias"] == pytest.approx(0.1)
    assert found["step"]["choices"][0]["regret"] == pytest.approx(0.2)  # equal predictions: the slower one


def test_ranks_of_one_plan_count_as_the_slowest(tmp_path: Path) -> None:
    rows = [layer(rank=0, step_ms=4.0), layer(rank=7, step_ms=7.0), layer(rank=7, step_ms=3.0, density=0.02)]
    found = told(written(tmp_path / "r.json", {"benchmark": "rank", "rows": rows}))["quantities"]["step"]
    assert found["errors"]["rows"] == 2
    assert found["errors"]["max"] == pytest.approx(6.3 / 3.0 - 1)
    assert found["errors"]["bias"] == pytest.approx(((6.3 / 7 - 1) + (6.3 / 3 - 1)) / 2)


def test_memory_in_rows_of_each_direction_counts_once(tmp_path: Path) -> None:
    memory = {
        "configuration": "a",
        "measured_us": 1.0,
        "predicted_us": 1.0,
        "measured_bytes": 50,
        "predicted_bytes": 60,
    }
    rows = [memory | {"direction": direction} for direction in ("forward", "backward")]
    found = told(written(tmp_path / "f.json", fidelity(*rows)))["quantities"]
    assert found["memory"]["errors"] == {"rows": 1, "median": pytest.approx(0.2), "p95": pytest.approx(0.2),
                                         "max": pytest.approx(0.2), "bias": pytest.approx(0.2)}  # fmt: skip


def test_phases_by_rank_and_phase(tmp_path: Path) -> None:
    times = [(0, 0, 10.0, 11.0), (0, 0, 10.0, 13.0), (1, 0, 10.0, 9.0)]
    rows = [
        {"configuration": "a", "rank": rank, "phase": phase, "measured_us": us, "predicted_us": predicted}
        for rank, phase, us, predicted in times
    ]
    found = told(written(tmp_path / "p.json", {"benchmark": "phases", "rows": rows}))
    assert found["quantities"]["phase"]["errors"]["rows"] == 3
    places = [(one["rank"], one["phase"], one["rows"], one["bias"]) for one in found["phases"]]
    assert places == [(0, 0, 2, pytest.approx(0.2)), (1, 0, 1, pytest.approx(-0.1))]


def test_timelines_of_one_plan_are_set_side_by_side(tmp_path: Path) -> None:
    timeline("measured", MEASURED).save(tmp_path / "m.json.gz")
    timeline("simulated", SIMULATED).save(tmp_path / "s.json")
    timeline("measured", MEASURED, "cd" * 32).save(tmp_path / "other-m.json")
    timeline("simulated", MEASURED, "cd" * 32).save(tmp_path / "other-s.json")
    names = ("m.json.gz", "other-s.json", "s.json", "other-m.json")
    found = told(*(tmp_path / name for name in names))
    assert {name: (one["errors"]["rows"], one["errors"]["max"]) for name, one in found["quantities"].items()} == {
        "forward": (2, pytest.approx(0.1)),  # 18 over 20
        "backward": (2, pytest.approx(0.1)),  # 33 over 30
        "step": (2, pytest.approx(0.02)),  # 51 over 50
        "phase": (6, pytest.approx(0.1)),
    }
    assert found["one_sided_phases"] == 1
    worst = {(one["direction"], one["rank"], one["phase"]): one["max"] for one in found["phases"]}
    assert worst == {
        ("forward", 0, 0): pytest.approx(0.1), ("forward", 1, 0): pytest.approx(0.1),
        ("backward", 0, 0): pytest.approx(0.1),
    }  # fmt: skip


class Links(HTMLParser):
    """What a page would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str | None] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.fetched += [value for name, value in attrs if name in ("src", "href", "data")]


@pytest.fixture
def page(tmp_path: Path) -> Path:
    hostile = steps()[0] | {"configuration": "<script>alert(1)</script>", "measured_bytes": 9, "predicted_bytes": 8}
    path = written(tmp_path / "f.json", fidelity(*steps(), hostile, *steps(calibration=True)))
    result = invoke(path, "--report", tmp_path / "page.html", "--tolerance", "step=0.001")
    assert result.exit_code == 1, result.output
    return tmp_path / "page.html"


def test_the_page_asks_nobody_and_says_what_is_missed(page: Path) -> None:
    text = page.read_text()
    links = Links()
    links.feed(text)
    assert [link for link in links.fetched if not (link or "").startswith("data:")] == []
    assert text.count("plotly.js v") == 1
    assert "missed: step.median: 10.00% is above 0.10%" in text
    assert "alert(1)</script>" not in text
    assert "step, calibrated on" in text


def test_the_page_opens_in_a_browser(page: Path, tmp_path: Path) -> None:
    document = opened(page, tmp_path / "browser")
    points = {name: len(re.findall(r'class="point[ "]', drawn(document, name))) for name in ("times", "memory")}
    assert points == {"times": 11, "memory": 1}


def test_a_page_takes_the_place_of_a_page_only(page: Path, tmp_path: Path) -> None:
    assert invoke(tmp_path / "f.json", "--report", page).exit_code == 0
    (tmp_path / "mine.html").write_text("<p>mine</p>")
    result = invoke(tmp_path / "f.json", "--report", tmp_path / "mine.html")
    assert (result.exit_code, (tmp_path / "mine.html").read_text()) == (2, "<p>mine</p>")
    assert "mine.html: exists and is no page of `validate`" in result.stderr
    assert invoke(tmp_path / "f.json", "--report", tmp_path / "page.txt").exit_code == 2


def test_every_result_file_with_predictions_is_read() -> None:
    results = Path(__file__).parents[2] / "benchmarks/results"
    kept = [path for path in results.glob("r*.json") if '"predicted_' in path.read_text()]
    assert kept
    found = told(*kept)["quantities"]
    assert found["memory"]["errors"]["rows"] > found["step"]["errors"]["rows"] > 0
