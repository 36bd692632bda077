"""Checkpoints: bitwise resume, SIGKILL in mid-step and in mid-save, flipped bits, export."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from rank_pool import RankFailure, RankPool
from sparsering.runtime.train.checkpoint import complete_checkpoints, remove_checkpoint, verify_checkpoint
from sparsering.runtime.train.config import load_config, parse_config
from sparsering.runtime.train.export import export_checkpoint
from sparsering.traces.errors import InputError
from train_runs import write_run

Pools = Callable[[int], RankPool]
PATTERN = {"selector": "vertical-slash", "settings": {"columns": 16, "slashes": 40, "window_tokens": 20}}


def _config(folder: Path, **changes: Any) -> dict[str, Any]:
    checkpoint = {"folder": str(folder / "checkpoints"), "every_steps": 2, "asynchronous": False}
    return write_run(folder, **({"plan": {"pattern": PATTERN}, "checkpoint": checkpoint} | changes))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, rank_pools: Pools) -> tuple[Path, dict[str, Any]]:
    """A finished run of five steps and what rank 0 returned."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    return folder, rank_pools(2).run("train_jobs.run", config=_config(folder))[0]


def _assert_bitwise(parameters: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> None:
    assert parameters.keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_array_equal(parameters[name], value, err_msg=name)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_stopped_run_resumes_bitwise(
    asynchronous: bool, tmp_path: Path, uninterrupted: tuple[Path, dict[str, Any]], rank_pools: Pools
) -> None:
    section = {"folder": str(tmp_path / "c"), "every_steps": 2, "keep_last": 1, "asynchronous": asynchronous}
    config = _config(tmp_path, checkpoint=section)
    first = rank_pools(2).run("train_jobs.run", config=config, stop_before=3)[0]
    assert [path.name for path in complete_checkpoints(tmp_path / "c")] == ["step-00000002"]
    second = rank_pools(2).run("train_jobs.run", config=config)[0]
    assert (first["first"], second["first"]) == (0, 2)
    assert first["losses"][:2] + second["losses"] == uninterrupted[1]["losses"]
    _assert_bitwise(second["parameters"], uninterrupted[1]["parameters"])
    assert [path.name for path in complete_checkpoints(tmp_path / "c")] == ["step-00000005"]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_killed_workers_resume_bitwise(tmp_path: Path, uninterrupted: tuple[Path, dict[str, Any]]) -> None:
    """The run is started again after a worker was killed in mid-step, and again in mid-save."""
    config = _config(tmp_path, max_restarts=2, metrics={"folder": str(tmp_path / "metrics")})
    folder = Path(config["checkpoint"]["folder"])
    command = [sys.executable, "-m", "sparsering.cli", "train", str(tmp_path / "config.yaml")]
    environment = os.environ | {"PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
    environment = {name: value for name, value in environment.items() if name not in ("RANK", "WORLD_SIZE")}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        try:
            _wait(lambda: (tmp_path / "metrics/rank-00001.jsonl").is_file() and _steps(tmp_path) >= 1, process)
            _kill(_workers(process.pid)[1])  # in step 1: after the first step's line, before any checkpoint
            killed_after = _steps(tmp_path)
            _wait(lambda: any(folder.glob("step-*.partial")), process)
            _kill(_workers(process.pid)[0])  # rank 0 writes the manifest: without it the save is not complete
            assert process.wait(timeout=240) == 0, process.stderr.read() if process.stderr else ""
        finally:
            for pid in _workers(process.pid):
                _kill(pid)
            process.kill()
    assert killed_after == 1
    assert _steps(tmp_path) > 5  # some steps were done again
    export_checkpoint(load_config(tmp_path / "config.yaml"), tmp_path / "exported")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "exported", dtype=torch.float32)
    _assert_bitwise({n: p.detach().numpy() for n, p in model.named_parameters()}, uninterrupted[1]["parameters"])


def _steps(folder: Path) -> int:
    return len((folder / "metrics/rank-00001.jsonl").read_text().splitlines())


def _wait(condition: Callable[[], bool], process: subprocess.Popen[str], timeout_s: float = 200.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        assert time.monotonic() < deadline
        time.sleep(0.001)


def _workers(parent: int) -> list[int]:
    """Return the ranks that our process started, in rank order."""
    return sorted(_children(parent))


def _children(parent: int) -> list[int]:
    try:
        tasks = list(Path(f"/proc/{parent}/task").iterdir())
        return [int(pid) for task in tasks for pid in (task / "children").read_text().split()]
    except OSError:
        return []


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def test_an_export_is_the_model(uninterrupted: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    folder, result = uninterrupted
    assert export_checkpoint(load_config(folder / "config.yaml"), tmp_path / "model")["step"] == 5
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    _assert_bitwise({name: p.detach().numpy() for name, p in model.named_parameters()}, result["parameters"])
    with pytest.raises(InputError, match="is not empty"):
        export_checkpoint(load_config(folder / "config.yaml"), tmp_path / "model")


def _copied(source: Path, target: Path) -> tuple[dict[str, Any], Path]:
    """Return a configuration whose newest checkpoint is a copy that may be damaged."""
    config = _config(target)
    newest = complete_checkpoints(source / "checkpoints")[-1]
    copy = target / "checkpoints" / newest.name
    copy.mkdir(parents=True)
    for path in newest.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    return config, copy


@pytest.mark.parametrize("name", [".metadata", "__1_0.distcp"])
def test_a_flipped_bit_is_refused_before_it_is_read(
    name: str, uninterrupted: tuple[Path, dict[str, Any]], tmp_path: Path, rank_pools: Pools
) -> None:
    config, copy = _copied(uninterrupted[0], tmp_path)
    verify_checkpoint(copy)
    data = bytearray((copy / name).read_bytes())
    data[len(data) // 2] ^= 1
    (copy / name).write_bytes(data)
    for attempt in (
        lambda: verify_checkpoint(copy),
        lambda: export_checkpoint(parse_config(config), tmp_path / "exported"),
    ):
        with pytest.raises(InputError, match=f"{name}.*sha256.*altered"):
            attempt()
    with pytest.raises(RankFailure, match=r"distcp.*altered|metadata.*altered"):
        rank_pools(2).run("train_jobs.run", config=config)


@pytest.mark.parametrize(
    ("changes", "field"),
    [({"seed": 1}, "seed"), ({"microbatches": 2}, "sequences_per_step"), ({"seq_len_tokens": 200}, "plan_digest")],
)
def test_another_run_does_not_resume(
    changes: dict[str, Any], field: str, uninterrupted: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    from sparsering.runtime.train.setup import set_up

    config, _ = _copied(uninterrupted[0], tmp_path)
    with pytest.raises(InputError, match=f"{field}: the checkpoint has"):
        set_up(parse_config(config | changes))


def test_what_is_not_complete_is_ignored(uninterrupted: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    _, copy = _copied(uninterrupted[0], tmp_path)
    (tmp_path / "checkpoints/step-00000009").mkdir()
    (tmp_path / "checkpoints/step-00000010.partial").mkdir()
    assert complete_checkpoints(tmp_path / "checkpoints") == [copy]
    (copy / "more").write_text("x")
    with pytest.raises(InputError, match="not listed"):
        verify_checkpoint(copy)
    (copy / "more").unlink()
    manifest = copy / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"step": 5', '"step": 6'))
    with pytest.raises(InputError, match=r"digest.*altered"):
        verify_checkpoint(copy)


@pytest.mark.parametrize("step", range(4))
def test_a_removal_that_is_stopped_leaves_no_part_of_a_checkpoint(
    step: int, uninterrupted: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    """Before each step of a removal the checkpoint is whole, or counts no more and goes when the next run begins."""
    _, copy = _copied(uninterrupted[0], tmp_path)
    left: list[str] | None = ["os.rename", "os.remove", "os.remove", "os.rmdir"][: step + 1]

    def hook(event: str, values: tuple[Any, ...]) -> None:
        nonlocal left
        if left and event == left[0]:
            left = left[1:]
            if not left:
                raise KeyboardInterrupt

    sys.addaudithook(hook)
    with pytest.raises(KeyboardInterrupt):
        remove_checkpoint(copy)
    for found in complete_checkpoints(copy.parent):
        verify_checkpoint(found)
    assert (complete_checkpoints(copy.parent) == [copy]) == (step == 0)
    assert [path.name.endswith(".partial") for path in copy.parent.iterdir()] == [step > 0]
