"""Jobs for tests/rank_pool.py that train: called as `function(mesh, **arguments)` on every rank."""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.tensor import DTensor

from sparsering.runtime import attention
from sparsering.runtime.mesh import Mesh
from sparsering.runtime.train_config import parse_config
from sparsering.runtime.train_loop import Trainer, TrainingError
from sparsering.runtime.train_model import decoder_layers
from sparsering.runtime.train_setup import set_up


def run(mesh: Mesh, *, config: dict[str, Any], stop_before: int | None = None) -> dict[str, Any]:
    """Train, from a checkpoint where there is one; stop_before: leave, as if killed, before that step."""
    trainer = Trainer(set_up(parse_config(config)), mesh)
    first = trainer.resume()
    results = trainer.run(stop_before=stop_before)
    trainer.close()
    return {
        "first": first,
        "losses": [result.loss for result in results],
        "norms": [result.grad_norm for result in results],
        "valid": [result.valid_tokens for result in results],
        "parameters": parameters(trainer),
    }


def counted(mesh: Mesh, *, config: dict[str, Any]) -> dict[str, Any]:
    """Do one step and count how often patterns were chosen and each direction of attention was played."""
    trainer = Trainer(set_up(parse_config(config)), mesh)
    assert trainer.masks is not None
    counts = {"chosen": 0, "forward": 0, "backward": 0}
    source, play = trainer.masks.source, attention.play

    def chosen(layer: int) -> Any:
        counts["chosen"] += 1
        return source(layer)

    def played(schedule: Any, *arguments: Any) -> None:
        counts[schedule.direction] += 1
        play(schedule, *arguments)

    trainer.masks.source, attention.play = chosen, played
    try:
        trainer.step()
    finally:
        attention.play = play
        trainer.close()
    return counts | {"parameters": parameters(trainer)}


def broken(mesh: Mesh, *, config: dict[str, Any], rank: int, layer: int, forward: bool) -> dict[str, Any]:
    """Make one rank's output of a layer, or its gradient, NaN in the second step; return what training said."""
    trainer = Trainer(set_up(parse_config(config)), mesh)
    trainer.step()
    before = parameters(trainer)
    if mesh.rank == rank:
        poison = torch.tensor(float("nan"))

        def hook(module: Any, inputs: Any, output: Any) -> Any:
            if forward:
                return output * poison
            output.register_hook(lambda gradient: gradient * poison)
            return output

        decoder_layers(trainer.hf_model)[layer].register_forward_hook(hook, prepend=True)
    try:
        trainer.step()
    except TrainingError as error:
        return {"error": str(error), "same": all((before[n] == p).all() for n, p in parameters(trainer).items())}
    finally:
        trainer.attached.detach()
    return {"error": "", "same": False}


def parameters(trainer: Trainer) -> dict[str, Any]:
    """Return the whole parameters as arrays."""
    named = trainer.hf_model.named_parameters()
    whole = {n: p.full_tensor() if isinstance(p, DTensor) else p for n, p in named}
    return {name: tensor.detach().numpy().copy() for name, tensor in whole.items()}
