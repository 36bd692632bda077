"""TensorBoard: real event files, read back by TensorBoard itself; one clear line where the package is missing."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rank_pool import RankPool
from sparsering.runtime.train.config import parse_config
from sparsering.runtime.train.setup import set_up
from sparsering.traces.errors import InputError
from train_runs import write_run


def _scalars(folder: Path) -> dict[str, dict[int, float]]:
    """Return every tag's value by step; a step that is there twice is refused."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    read = accumulator.EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    found: dict[str, dict[int, float]] = {}
    for tag in read.Tags()["scalars"]:
        events = [(event.step, event.value) for event in read.Scalars(tag)]
        found[tag] = dict(events)
        assert len(found[tag]) == len(events), tag
    return found


def _expected(line: dict[str, Any]) -> dict[str, float]:
    """Return what of a line of metrics is a number, or a list of them."""
    flat: dict[str, float] = {}
    for name, value in line.items():
        values = {f"{name}/{place:03d}": one for place, one in enumerate(value)} if isinstance(value, list) else {}
        flat |= {tag: one for tag, one in ({name: value} | values).items() if isinstance(one, int | float)}
    del flat["rank"], flat["step"]
    return flat


def test_event_files_hold_what_the_metrics_say(tmp_path: Path, rank_pools: Callable[[int], RankPool]) -> None:
    pytest.importorskip("tensorboard")
    folder = tmp_path / "metrics"
    config = write_run(
        tmp_path, steps=4, metrics={"folder": str(folder), "tensorboard": True, "peak_flops_per_device": 1e9},
        checkpoint={"folder": str(tmp_path / "checkpoints"), "every_steps": 2, "asynchronous": False},
    )  # fmt: skip
    set_up(parse_config(config))
    assert not folder.exists()  # checking a run writes nothing
    rank_pools(2).run("train_jobs.run", config=config, stop_before=3)
    assert set(_scalars(folder)["loss"]) == {0, 1, 2}
    rank_pools(2).run("train_jobs.run", config=config)  # step 2 is done again, and counts once
    lines = [json.loads(line) for line in (folder / "rank-00000.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2, 2, 3]
    found = _scalars(folder)
    expected = [(line["step"], _expected(line)) for line in lines[:2] + lines[3:]]
    assert {"loss", "grad_norm", "tokens_per_s", "mfu_actual", "density_per_layer/001"} <= expected[0][1].keys()
    assert found.keys() == expected[0][1].keys()
    for step, wanted in expected:
        assert {tag: found[tag][step] for tag in wanted} == pytest.approx(wanted, rel=1e-6)


def test_without_the_package_it_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "tensorboard"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    monkeypatch.setitem(sys.modules, "tensorboard", None)  # how Python says that an import must fail
    config = write_run(tmp_path, metrics={"folder": str(tmp_path / "metrics"), "tensorboard": True})
    with pytest.raises(InputError, match=r"^metrics\.tensorboard: needs the package tensorboard") as caught:
        set_up(parse_config(config))
    assert "\n" not in str(caught.value)
