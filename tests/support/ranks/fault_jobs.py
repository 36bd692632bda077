"""Faults of one rank of a training run, planted for its second step; a job for rank_pool.py trains with one of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.tensor import DTensor

from sparsering.kernels import backend
from sparsering.kernels.mask import AttentionMask
from sparsering.kernels.plain import blockwise
from sparsering.runtime.attention import launches, planned
from sparsering.runtime.comm.channels import HostChannel
from sparsering.runtime.comm.mesh import Mesh
from sparsering.runtime.model.shape import decoder_layers
from sparsering.runtime.train import loop
from sparsering.runtime.train.config import parse_config
from sparsering.runtime.train.loop import Trainer
from sparsering.runtime.train.optimizer import TrainingError
from sparsering.runtime.train.selfcheck import attention
from sparsering.runtime.train.setup import set_up
from train_jobs import parameters

Patch = pytest.MonkeyPatch


def faulted(mesh: Mesh, *, config: dict[str, Any], fault: str, rank: int) -> dict[str, Any]:
    """Do a good step, then one with a fault on a rank; return what training said, and whether parameters are as before.

    same: whether they are, leaving out what the fault itself changed.
    """
    trainer = Trainer(set_up(parse_config(config)), mesh)
    trainer.step()
    before = parameters(trainer)
    with pytest.MonkeyPatch.context() as patch:
        if mesh.rank == rank:
            FAULTS[fault](trainer, patch)
        try:
            trainer.step()
            told = ""
        except TrainingError as error:
            told = str(error)
    torch.set_float32_matmul_precision("highest")
    after = parameters(trainer)
    trainer.close()
    return {"told": told, "same": fault == "a parameter" or all((before[n] == p).all() for n, p in after.items())}


def _mask(trainer: Trainer, patch: Patch) -> None:
    """Fewer blocks than the mask that was hashed."""
    given = trainer.attached.masks
    assert given is not None

    def altered(layer: int) -> Callable[..., AttentionMask]:
        def choose(*arguments: Any) -> AttentionMask:
            chooser: Any = given(layer)
            mask = chooser(*arguments)
            active = mask.active.clone()
            active[..., 1:] = False
            return replace(mask, active=active)

        return choose

    patch.setattr(trainer.attached, "masks", altered)


def _merge(trainer: Trainer, patch: Patch) -> None:
    """Every launch forgets what earlier ones had attended."""
    forward = launches.api.forward
    patch.setattr(
        launches.api, "forward",
        lambda queries, keys, columns, earlier, final: forward(queries, keys, columns, earlier=None, final=final),
    )  # fmt: skip


def _sinks(trainer: Trainer, patch: Patch) -> None:
    """Learned sinks are left out of what attention returns."""
    patch.setattr(backend, "with_sinks", lambda out, lse, sinks: (out, lse))


def _softcap(trainer: Trainer, patch: Patch) -> None:
    """Scores are not capped."""
    patch.setattr(
        planned, "ForwardLaunches",
        lambda *, layer, scale, softcap: launches.ForwardLaunches(layer=layer, scale=scale),
    )  # fmt: skip


def _window(trainer: Trainer, patch: Patch) -> None:
    """Blocks that a window cuts are attended whole."""
    whole = blockwise.BlockTile.hide
    patch.setattr(blockwise.BlockTile, "hide", lambda tile, scores: whole(replace(tile, edge=None), scores))


def _channel(change: Callable[[Any], Any]) -> Callable[[Trainer, Patch], None]:
    def plant(trainer: Trainer, patch: Patch) -> None:
        post = HostChannel.post
        patch.setattr(HostChannel, "post", lambda self, messages: post(self, [change(one) for one in messages]))

    return plant


def _stale(message: Any) -> Any:
    return replace(message, tensor=message.tensor.clone()) if message.operation == "receive" else message


def _corrupted(message: Any) -> Any:
    floats = message.operation == "send" and message.tensor.is_floating_point()
    return replace(message, tensor=message.tensor * 1.01) if floats else message


def _gathered_weights(trainer: Trainer, patch: Patch) -> None:
    """A layer computes with other weights than its shards say; the check looks after that."""
    for layer in decoder_layers(trainer.hf_model):
        hooks: Any = layer._forward_pre_hooks
        ours = next(reversed(hooks))

        def spoil(module: Any, inputs: Any) -> None:
            next(module.parameters()).detach().mul_(1.01)

        layer.register_forward_pre_hook(spoil)
        hooks.move_to_end(ours)


def _parameter(trainer: Trainer, patch: Patch) -> None:
    _local(next(iter(trainer.model.parameters()))).add_(1e-3)


def _moment(trainer: Trainer, patch: Patch) -> None:
    _local(next(iter(trainer.optimizer.state.values()))["exp_avg"]).flatten()[0] += 1e-6


def _other_data(trainer: Trainer, patch: Patch) -> None:
    data = trainer.setup.data
    at_step = data.at_step
    patch.setattr(data, "at_step", lambda step, slot, **sizes: at_step(step + 1, slot, **sizes))


def _batch(change: Callable[[Any], Any]) -> Callable[[Trainer, Patch], None]:
    def plant(trainer: Trainer, patch: Patch) -> None:
        cut = loop.cut
        patch.setattr(loop, "cut", lambda *arguments, **named: change(cut(*arguments, **named)))

    return plant


def _gradients(place: int) -> Callable[[Trainer, Patch], None]:
    def plant(trainer: Trainer, patch: Patch) -> None:
        planned: Any = trainer.attached.planned._attention  # pyright: ignore[reportAttributeAccessIssue]
        backward = planned.backward

        def wrong(*arguments: Any) -> Any:
            gradients = list(backward(*arguments))
            gradients[place] = gradients[place] * 1.01
            return tuple(gradients)

        patch.setattr(planned, "backward", wrong)

    return plant


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


FAULTS: dict[str, Callable[[Trainer, Patch], None]] = {
    "nothing": lambda trainer, patch: None,
    "mask": _mask,
    "merge": _merge,
    "sinks": _sinks,
    "softcap": _softcap,
    "window": _window,
    "stale receives": _channel(_stale),
    "corrupted sends": _channel(_corrupted),
    "gathered weights": _gathered_weights,
    "a parameter": _parameter,
    "a moment": _moment,
    "weight decay": lambda trainer, patch: trainer.optimizer.param_groups[0].update(weight_decay=0.2),
    "arithmetic": lambda trainer, patch: torch.set_float32_matmul_precision("medium"),
    "other data": _other_data,
    "labels": _batch(lambda batch: replace(batch, labels=batch.labels.roll(1, 1))),
    "tokens": _batch(lambda batch: replace(batch, input_ids=batch.input_ids.roll(1, 1))),
    "positions": _batch(lambda batch: replace(batch, position_ids=batch.position_ids + 1)),
    # Other numbers of the same documents: with others ranks choose other patterns, which they notice before.
    "documents": _batch(lambda batch: replace(batch, documents=batch.documents + 1)),
    "cut documents": _batch(
        lambda batch: replace(batch, documents=batch.documents + (torch.arange(len(batch.documents)) > 100).int())
    ),
    "dq": _gradients(0),
    "dk": _gradients(1),
    "dv": _gradients(2),
}


def excesses(mesh: Mesh, *, config: dict[str, Any]) -> dict[str, float]:
    """Do one step and return the largest error of each quantity over the bound that the check allows.

    The check takes a shard's tokens in several parts, as it does where they are many.
    """
    trainer = Trainer(set_up(parse_config(config)), mesh)
    assert trainer.check is not None and trainer.check.attention is not None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "PART_TOKENS", 96)
        trainer.step()
    compared = trainer.check.attention.compared
    found: dict[str, float] = {}
    for one in compared:
        found[one.quantity] = max(found.get(one.quantity, 0.0), one.excess.item())
        assert one.positions.numel() and np.isfinite(one.wanted.bound.cpu().numpy()).all()
    trainer.close()
    return found
