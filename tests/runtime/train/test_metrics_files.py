"""What a full disk, or a kill, does to the files of metrics: one error, and a next run that goes on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sparsering.runtime.train.config import parse_config
from sparsering.runtime.train.metrics import Outputs, StepResult
from sparsering.runtime.train.writers.json_lines import JsonLines
from sparsering.runtime.train.writers.writer import NotWritten
from train_runs import write_run

WHOLE = b'{"rank": 0, "step": 0}\n'


@pytest.mark.parametrize("torn", [b"", WHOLE, WHOLE + b'{"rank": 0, "st', b'{"rank"'])
def test_a_torn_line_is_removed_before_the_next_is_written(torn: bytes, tmp_path: Path) -> None:
    path = tmp_path / "rank-00000.jsonl"
    path.write_bytes(torn)
    writer = JsonLines(tmp_path, rank=0)
    writer.write(1, {"step": 1})
    writer.close()
    steps = [json.loads(line)["step"] for line in path.read_text().splitlines()]
    assert steps == ([0, 1] if WHOLE in torn else [1])


def test_a_full_disk_is_one_error_that_names_step_rank_and_folder(tmp_path: Path) -> None:
    config = parse_config(write_run(tmp_path, metrics={"folder": str(tmp_path / "metrics")}))
    (tmp_path / "metrics").mkdir()
    (tmp_path / "metrics/rank-00001.jsonl").symlink_to("/dev/full")
    outputs = Outputs(config, rank=1, first_step=0, header=None)
    result = StepResult(step=4, loss=1.0, grad_norm=1.0, learning_rate=1.0, valid_tokens=1, tokens=1, seconds=1.0,
                        parts_ms={})  # fmt: skip
    with pytest.raises(NotWritten) as raised:
        outputs.write(result, None)
    told = f"step 4: what rank 1 measured could not be written to {tmp_path / 'metrics'}: No space left on device"
    assert str(raised.value) == told
    outputs.close()  # which does not fail again
