"""Metrics as JSON lines and in Weights & Biases, by the package itself in offline mode, read back from its files."""

from __future__ import annotations

import json
import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sparsering.runtime.train.config import MetricsSection, TrainConfig, parse_config
from sparsering.runtime.train.writers.opened import open_writers, require_packages
from sparsering.runtime.train.writers.writer import scalars
from sparsering.traces.errors import InputError

BLOCK_BYTES = 32768
STEPS: tuple[dict[str, Any], ...] = (
    {"step": 0, "loss": 2.5, "kept_mass": None, "density_per_layer": [0.25, 0.5], "density_per_head": [[0.1], [0.2]]},
    {"step": 1, "loss": 2.25, "kept_mass": 0.75, "density_per_layer": [0.125, 1.0]},
)
NUMBERS = (
    {"loss": 2.5, "density_per_layer/000": 0.25, "density_per_layer/001": 0.5},
    {"loss": 2.25, "kept_mass": 0.75, "density_per_layer/000": 0.125, "density_per_layer/001": 1.0},
)


def config_with(folder: Path, **metrics: Any) -> TrainConfig:
    document = {
        "model": {"path": "model"}, "data": {"folder": "data"}, "seq_len_tokens": 256, "steps": 2,
        "metrics": {"folder": str(folder), **metrics},
    }  # fmt: skip
    return parse_config(document)


def write_all(config: TrainConfig, *, rank: int) -> None:
    writers = open_writers(config, rank=rank, first_step=0)
    for values in STEPS:
        for writer in writers:
            writer.write(values["step"], values)
    for writer in writers:
        writer.close()


def test_scalars_are_the_numbers_of_a_step() -> None:
    assert tuple(dict(scalars(values)) for values in STEPS) == NUMBERS


def test_every_rank_has_lines_of_its_own(tmp_path: Path) -> None:
    for rank in (0, 3):
        write_all(config_with(tmp_path), rank=rank)
        lines = (tmp_path / f"rank-{rank:05d}.jsonl").read_text().splitlines()
        assert [json.loads(line) for line in lines] == [{"rank": rank} | values for values in STEPS]
    assert len(list(tmp_path.iterdir())) == 2


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"metrics\.folder: cannot be written"):
        open_writers(config_with(tmp_path / "file"), rank=0, first_step=0)


def test_without_the_package_it_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # how Python says that an import must fail
    section = config_with(tmp_path, wandb={"project": "x", "mode": "offline"}).metrics
    assert isinstance(section, MetricsSection)
    with pytest.raises(InputError) as caught:
        require_packages(section)
    assert str(caught.value) == "metrics.wandb: needs the package wandb: pip install wandb"


@pytest.mark.parametrize(
    ("section", "told"),
    [({}, "project"), ({"project": ""}, "project"), ({"project": "x", "mode": "of"}, "mode"), ({"projekt": 1}, "pro")],
)
def test_wrong_settings_name_their_field(tmp_path: Path, section: dict[str, Any], told: str) -> None:
    with pytest.raises(InputError, match=rf"metrics\.wandb\.{told}"):
        config_with(tmp_path, wandb=section)


def test_an_offline_run_holds_every_number(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    config = config_with(tmp_path, wandb={"project": "rings", "name": "first", "mode": "offline"})
    require_packages(config.metrics or MetricsSection(folder=tmp_path))
    write_all(config, rank=1)
    assert not (tmp_path / "wandb").exists()  # one run, of rank 0
    write_all(config, rank=0)
    (recorded,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    history, run = read_back(recorded)
    steps = [{name: value for name, value in row.items() if not name.startswith("_")} for row in history]
    assert steps == list(NUMBERS)
    assert [row["_step"] for row in history] == [0, 1]
    assert (run.project, run.display_name) == ("rings", "first")
    assert json.loads(next(one.value_json for one in run.config.update if one.key == "steps")) == 2


def read_back(path: Path) -> tuple[list[dict[str, float]], Any]:
    """Return what an offline run's file holds: the rows of history, and the record of the run."""
    from importlib import import_module

    parse = import_module("wandb.proto.wandb_internal_pb2").Record.FromString
    history, run, records = [], None, []
    for _ in range(300):  # the service that writes the file may end a moment after the run
        records = [parse(data) for data in stored_records(path.read_bytes())]
        if any(record.WhichOneof("record_type") == "exit" for record in records):
            break
        time.sleep(0.1)
    for record in records:
        if record.WhichOneof("record_type") == "run":
            run = record.run
        elif record.WhichOneof("record_type") == "history":
            items = record.history.item
            history.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
    return history, run


def stored_records(data: bytes) -> Iterator[bytes]:
    """Yield the records of a file in LevelDB's log format: blocks of 32 KiB, behind 7 bytes that say what it is."""
    place, record = 7, b""
    while place + 7 <= len(data):
        room = BLOCK_BYTES - place % BLOCK_BYTES
        if room < 7:
            place += room
            continue
        length, kind = struct.unpack("<HB", data[place + 4 : place + 7])
        record += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            yield record
            record = b""
