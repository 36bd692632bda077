"""What sparse training learns beside dense: arms of a study are trained from one model and judged on held-out text.

A study's file says beforehand which arms there are, how each is trained and how all are judged
(`benchmarks/studies/`). Every arm starts from the same weights and sees the same tokens in the same order. A row holds
what one arm's evaluation found, by its own attention and by dense attention with the same weights, the loss of every
step, and the time of its steps; `--steps` trains a few steps alone, to time arms, and judges nothing.

    python -m sparsering.benchmarks.learning benchmarks/studies/smollm2-64k.yaml --model smollm2 \\
        --data corpus/train --heldout corpus/heldout --gpus 2 --arms dense-2e-4 block-mass-10
    python -m sparsering.benchmarks.learning STUDY … --steps 24       # step times of all arms

With `--weights` what an arm has learnt is kept in files, and an arm that is there is judged without training it again:
by as many ranks as one likes, or elsewhere.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from transformers import AutoModelForCausalLM, PreTrainedModel

from ..kernels.select.registry import Selector
from ..runtime.comm.mesh import Mesh, join, leave
from ..runtime.comm.start import start_ranks
from ..runtime.data.shards import TokenData
from ..runtime.data.writer import model_tokenizer
from ..runtime.evaluate.evaluate import evaluate
from ..runtime.evaluate.result import Evaluation
from ..runtime.model.load import pretrained
from ..runtime.pattern.by_layer import selector_by_rules
from ..runtime.train.config import TrainConfig
from ..runtime.train.loop import Trainer
from ..runtime.train.metrics import StepResult
from ..runtime.train.setup import Setup, set_up
from ..traces.errors import InputError
from .lib.common import RESULTS, ResultFile
from .lib.learning.kept import KeptArm
from .lib.learning.study import Study, read_study

SKIPPED_STEPS = 4  # of those that are timed: kernels are compiled and memory is taken in them


def main() -> None:
    """Start the ranks, or be one; what cannot be run is one line and exit code 2."""
    try:
        _run(parser().parse_args())
    except InputError as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        raise SystemExit(2) from error


def _run(arguments: argparse.Namespace) -> None:
    study = read_study(arguments.study)
    arguments.arms = arguments.arms or list(study.arms)
    for arm in arguments.arms:
        _config(arguments, study, arm)
    if "RANK" not in os.environ:
        environment = os.environ | {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
        raise SystemExit(start_ranks(sys.argv[1:], world_size=arguments.gpus, environment=environment,
                                     module="sparsering.benchmarks.learning"))  # fmt: skip
    world = join(device=arguments.device, timeout_s=540)
    result = ResultFile("eval", folder=arguments.results, gpus=arguments.gpus)
    # All of them first: fused layers replace parts of transformers for good, and the audit's small model is on the CPU.
    setups = {arm: set_up(_config(arguments, study, arm), verify_data=False) for arm in arguments.arms}
    if arguments.steps is None and world.rank == 0:
        for setup in setups.values():
            rehearse(arguments, study, setup, world.device)
    world.broadcast("rehearsed", "done")
    rows = (run_arm(arguments, study, arm, setup, world) for arm, setup in setups.items())
    result.write_as_they_come(rows, _line, first_rank=world.rank == 0)
    leave()


def parser() -> argparse.ArgumentParser:
    """Return the command line: what a result's `command` was parsed by."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("study", type=Path, help="a study's file")
    options.add_argument("--model", type=Path, required=True, help="the model folder that all arms start from")
    options.add_argument("--data", type=Path, required=True, help="what they are trained on (`sparsering data`)")
    options.add_argument("--heldout", type=Path, required=True, help="what they are judged on")
    options.add_argument("--arms", nargs="+", help="of the study's; default: all")
    options.add_argument("--gpus", type=int, default=1, help="ranks that share a sequence")
    options.add_argument("--steps", type=int, help="train so many steps, for their time alone; nothing is judged")
    options.add_argument("--weights", type=Path, help="folder for trained arms; those in it are judged as they are")
    options.add_argument("--device", choices=["cpu", "cuda"], help="default: GPUs where there are any")
    options.add_argument("--results", type=Path, default=RESULTS)
    return options


def _config(arguments: argparse.Namespace, study: Study, arm: str) -> TrainConfig:
    return study.config(
        arm, model=arguments.model, data=arguments.data, context=arguments.gpus, steps=arguments.steps
    )  # fmt: skip


def rehearse(arguments: argparse.Namespace, study: Study, setup: Setup, device: torch.device) -> None:
    """Judge the model that an arm starts from by as little as possible: what cannot be judged fails before training."""
    start = pretrained(setup.config.model.folder, setup.model_config, dtype=torch.float32)
    _judged(arguments, study.rehearsed(), setup, start.state_dict(), device)


def run_arm(arguments: argparse.Namespace, study: Study, arm: str, setup: Setup, world: Mesh) -> dict[str, Any]:
    """Train one arm and judge it on the first rank; return its row, {} on other ranks."""
    kept = None if arguments.weights is None else KeptArm(folder=arguments.weights, arm=arm)
    found = None if kept is None else kept.read(setup.config)
    world.broadcast(f"looked for {arm}", "done")
    if found is None:
        found = _trained(arm, setup, world)
        if kept is not None and world.rank == 0:
            kept.write(setup.config, *found)
        gc.collect()
    row, state = found
    if arguments.steps is None and world.rank == 0:
        row |= _judged(arguments, study, setup, state, world.device)
    world.broadcast(f"judged {arm}", "done")  # the others wait: the next arm begins together
    return row if world.rank == 0 else {}


def _trained(arm: str, setup: Setup, world: Mesh) -> tuple[dict[str, Any], dict[str, Any]]:
    """Train one arm; return what its row says of that, and the weights."""
    config, trainer = setup.config, Trainer(setup, world)
    results = trainer.run()
    state = get_model_state_dict(trainer.hf_model, options=StateDictOptions(full_state_dict=True))
    trainer.close()
    own = {name: getattr(config, name) for name in ("attention", "steps", "seed")} | _pattern(config)
    own |= {"arm": arm, "seq_len": config.seq_len_tokens, "world_size": world.world_size,
            "learning_rate": config.optimizer.learning_rate, "plan_digest": setup.plan.digest,
            "memory_bytes": _peak_bytes(world.device)}  # fmt: skip
    return own | _of_training(results), state


def _judged(
    arguments: argparse.Namespace, study: Study, setup: Setup, state: dict[str, Any], device: torch.device
) -> dict[str, Any]:
    began, config = time.perf_counter(), setup.config
    selector = _selector(config, layers=setup.facts.shape.layers)
    data, model = TokenData.open(arguments.heldout), _plain_model(setup, state, device)
    tokenizer = None if data.manifest.tokenizer == "byte" else model_tokenizer(arguments.model)
    found = [
        evaluate(model, data, selector, settings, tokenizer=tokenizer)
        for settings in study.evaluations(config, sparse=selector is not None)
    ]
    del model
    gc.collect()
    return _of_evaluations(found) | {"judged_s": time.perf_counter() - began, "heldout_digest": data.manifest.digest}


def _plain_model(setup: Setup, state: dict[str, Any], device: torch.device) -> PreTrainedModel:
    """Return the trained weights in the run's type, as a model of transformers on this rank's device."""
    # Made in that type, not converted to it: rotation's frequencies stay float32.
    model = AutoModelForCausalLM.from_config(setup.model_config, dtype=getattr(torch, setup.config.dtype))
    model.load_state_dict(state)
    return model.to(device=device).eval()


def _selector(config: TrainConfig, *, layers: int) -> Selector | None:
    """Return what chooses the arm's patterns; None for dense attention."""
    return selector_by_rules(config.plan.pattern, layers=layers) if config.attention == "planned" else None


def _pattern(config: TrainConfig) -> dict[str, Any]:
    """Return the arm's pattern in a row's words."""
    if config.attention != "planned":
        return {"selector": "dense", "settings": {}}
    pattern = config.plan.pattern.model_dump(mode="json")
    return {
        "selector": pattern["selector"], "settings": pattern["settings"], "layer_rules": pattern["layers"],
        "block_size": config.plan.block_size,
    }  # fmt: skip


def _of_training(results: list[StepResult]) -> dict[str, Any]:
    """Return times of the steps after the first ones, medians, and the loss of every step."""
    timed = results[SKIPPED_STEPS:] or results
    parts = {f"{part}_ms": statistics.median(one.parts_ms[part] for one in timed) for part in timed[0].parts_ms}
    return {
        "step_ms": statistics.median(1e3 * one.seconds for one in timed), **parts,
        "train_losses": [None if one.loss is None else round(one.loss, 5) for one in results],
        "train_seconds": sum(one.seconds for one in results),
    }  # fmt: skip


def _of_evaluations(found: list[Evaluation]) -> dict[str, Any]:
    """Return the row's figures of an arm's evaluations: of text, then of what was planted in it."""
    own = {"total_density": None, "heldout_loss": None, "heldout_loss_dense": None, "needle_last": None,
           "needle_mid": None}  # fmt: skip
    for one in found:
        own |= {name: value for name, value in one.row().items() if name in own and value is not None}
    readings = [reading.model_dump(mode="json") for one in found for reading in one.readings]
    cells = [cell.model_dump(mode="json") for one in found for cell in one.cells]
    reach = [layer.model_dump(mode="json") for one in found for layer in one.reach]
    return own | {"readings": readings, "cells": cells, "reach": reach, "attended": [one.attention for one in found]}


def _peak_bytes(device: torch.device) -> int | None:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def _line(row: dict[str, Any]) -> str:
    shown = ("arm", "total_density", "heldout_loss", "heldout_loss_dense", "needle_last", "needle_mid", "step_ms")
    return "  ".join(f"{name} {row[name]:.4f}" if isinstance(row.get(name), float) else f"{name} {row.get(name)}"
                     for name in shown)  # fmt: skip


if __name__ == "__main__":
    main()
