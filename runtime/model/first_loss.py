"""Compared once, when an attached model first computes a loss: labels, their count, and the weights of all ranks.

By then trainers have made weights equal, and labels are there. One exchange through the store; no collective.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from ...traces.errors import InputError
from ...traces.files import sha256_of_bytes
from ..comm.mesh import Mesh, agree
from .shard import IGNORED_LABEL

_LOSSES = itertools.count()  # ranks compute their first losses in the same order
SAMPLED = 64  # elements of every parameter


def check_first_loss(mesh: Mesh, model: torch.nn.Module, given: dict[str, Any]) -> None:
    """Compare with all ranks, before the first loss of an attached model: collective, and waits for the device.

    given: the arguments of the model's call. Raises InputError when labels are not shifted, when num_items_in_batch is
    less than the valid labels of all ranks, or when ranks hold different weights.
    """
    labels, ids = given["shift_labels"], given.get("input_ids")
    valid = labels != IGNORED_LABEL
    # A text of one repeated token rightly predicts itself.
    if ids is not None and bool((labels == ids)[valid].all()) and ids[valid].unique().numel() > 1:
        raise InputError("are the tokens themselves, not shifted: pass what shard() returns", field="shift_labels")
    topic = f"first loss {next(_LOSSES)}"
    mesh.store.set(f"sparsering/{topic}/{mesh.rank}", str(int(valid.sum())))
    total = sum(int(mesh.store.get(f"sparsering/{topic}/{rank}").decode()) for rank in range(mesh.world_size))
    stated = int(given["num_items_in_batch"])
    if stated < total:
        raise InputError(f"is {stated}, ranks have {total} valid labels: pass what shard() returns",
                         field="num_items_in_batch")  # fmt: skip
    whole = [p for p in model.parameters() if not isinstance(p, DTensor) and p.device.type != "meta"]  # on this rank
    sampled = [parameter.detach().reshape(-1)[:SAMPLED].double() for parameter in whole]
    data = torch.cat(sampled).cpu().numpy().tobytes() if sampled else b""
    agree(mesh, f"{topic} weights", sha256_of_bytes(data))
