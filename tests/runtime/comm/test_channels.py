"""Channels over gloo: what a message carried is let go of when it has arrived, not when the next one is posted."""

from __future__ import annotations

import gc
import time
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed import HashStore  # pyright: ignore[reportPrivateImportUsage]

from sparsering.runtime.comm.channels import HostChannel, Message

LET_GO_S = 20.0  # in which the channel's thread lays down what it has played


@pytest.fixture
def channel() -> Iterator[HostChannel]:
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    assert dist.group.WORLD is not None
    opened = HostChannel("test", dist.group.WORLD, first_process=0)
    try:
        yield opened
    finally:
        opened.close()
        dist.destroy_process_group()


@pytest.mark.parametrize("operation", ["all_reduce", "all_gather", "reduce_scatter"])
def test_an_idle_channel_holds_no_tensors(channel: HostChannel, operation: Any) -> None:
    tensor, output = torch.ones(8), torch.zeros(8)
    # Storages, which works hold by tensors of their own in C++: a weak reference to a tensor would say nothing.
    held = [weakref.ref(one.untyped_storage()) for one in (tensor, output)]
    channel.post([Message(operation=operation, tensor=tensor, output=output)]).wait()
    del tensor, output
    deadline = time.monotonic() + LET_GO_S
    while any(one() is not None for one in held) and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.01)
    assert all(one() is None for one in held), f"the channel holds what its last {operation} carried"
