"""What `doctor --kernels` does on a GPU: check every kind of problem, then find the fastest launch settings."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from ..triton import tuning
from . import accuracy, tune

Say = Callable[[str], object]


def check_kernels(backend: str, say: Say) -> Iterator[dict[str, Any]]:
    """One row per case of accuracy.cases: its state ("works", "wrong", "refused") and its errors over plain torch's."""
    device = torch.device("cuda")
    say(f"{torch.cuda.get_device_name()}: errors over those of plain torch, at most {accuracy.ALLOWED_RATIO:.0f}")
    for case in accuracy.cases():
        row: dict[str, Any] = {"case": str(case)}
        try:
            ratios = accuracy.error_ratios(case, backend, device)
        except ValueError as error:  # the backend says that it has no such kernel
            row |= {"state": "refused", "reason": str(error)}
            say(f"  {case}: refused, {error}")
        else:
            right = _right(ratios)
            row |= {"state": "works" if right else "wrong", "error_ratios": ratios}
            figures = "  ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items())
            say(f"  {case}: {figures}{'' if right else '   WRONG'}")
        yield row


def tune_kernels(shape_settings: Mapping[str, Any], output: Path, say: Say) -> dict[str, Any]:
    """Time all candidates, write the fastest into `output` and return both. Raises ValueError for a bad shape."""
    shape = tune.Shape(**shape_settings)
    capability = tuning.capability_of(torch.device("cuda"))
    jobs = tune.candidates(shape, tma=capability >= 90)
    say(f"timing {len(jobs)} settings at {shape.seq_len_tokens} tokens, density about {shape.density}; compiling first")
    trials = []
    for trial in tune.sweep(shape, jobs):
        trials.append(trial)
        say(_line(trial))
    document = tune.launches_document(shape, tune.best(trials), capability=capability)
    _check_found(document, say)
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(output.name + ".partial")
    partial.write_text(json.dumps(document, indent=1) + "\n")
    partial.replace(output)
    say(f"fastest settings written to {output}")
    rows = [{"kernel": t.kernel, "launch": vars(t.launch), "time_ms": t.time_ms, "tflops": t.tflops} for t in trials]
    return {"launches": document, "trials": rows, "output": str(output)}


def _check_found(document: Mapping[str, Any], say: Say) -> None:
    """Raise ValueError, before anything is written, when attention with the fastest launches is not exact enough."""
    tuning.use(**document)
    shape = document["head_dim"], document["block_size"]
    cases = [case for case in accuracy.cases() if (case.head_dim, case.block_size) == shape]
    device = torch.device("cuda")
    wrong = [str(case) for case in cases if not _right(accuracy.error_ratios(case, "triton", device))]
    if wrong:
        raise ValueError(f"the fastest launches are wrong for {'; '.join(wrong)}: nothing was written")
    say("the fastest settings of every kernel agree with float64 too")


def _right(ratios: Mapping[str, float]) -> bool:
    return all(ratio <= accuracy.ALLOWED_RATIO for ratio in ratios.values())


def _line(trial: tune.Trial) -> str:
    launch = trial.launch
    sizes = [launch.m, launch.n, launch.warps, launch.stages, *([launch.registers] if launch.registers else [])]
    tiles = "x".join(map(str, sizes))
    result = trial.error if trial.time_ms is None else f"{trial.time_ms:8.3f} ms {trial.tflops:6.0f} TFLOP/s"
    return f"  {trial.kernel:15} {tiles:16} {result}"
