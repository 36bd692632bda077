"""What this process makes once for all models and plans that it attaches: process groups, and the channels over them.

Nothing can free a process group before the whole process leaves: on GPUs each holds a communicator's buffers, on CPUs
threads that look for work a hundred times a second. So who attaches, detaches and attaches again must get what is
there. Ranks ask for the same things in the same order, as they do for anything collective.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch.distributed as dist

from .channels import Channels
from .mesh import Mesh, at_leave


@dataclass
class _Made:
    """All that was made over one default process group."""

    world: dist.ProcessGroup
    groups: dict[tuple[str, int, int], dist.ProcessGroup] = field(default_factory=dict)
    channels: dict[tuple[int, int], Channels] = field(default_factory=dict)


_made: list[_Made] = []  # one, or none yet


def common_group(mesh: Mesh, purpose: str, *, backend: str | None = None) -> dist.ProcessGroup:
    """Return the process group of all ranks of the mesh for one purpose, made at its first use. Collective.

    What is sent over it follows the order of the host's calls, so threads must not share a purpose. backend: of
    `Mesh.new_group`; a purpose has one.
    """
    groups, key = _of(mesh).groups, (purpose, mesh.world_size, mesh.replicas)
    if key not in groups:
        group = mesh.new_group(range(mesh.world_size), backend=backend)
        assert group is not None, "this rank is one of the mesh's"
        groups[key] = group
    return groups[key]


def common_channels(mesh: Mesh) -> Channels:
    """Return the channels that all plans of this mesh share; each opens what it needs and nobody has opened yet."""
    channels, key = _of(mesh).channels, (mesh.world_size, mesh.replicas)
    if key not in channels:
        channels[key] = Channels(mesh)
    return channels[key]


def _of(mesh: Mesh) -> _Made:
    """Return what was made over the default process group, which may be another one than last time."""
    world = dist.group.WORLD
    assert world is not None, "a mesh stands for a process group"
    if not _made or _made[0].world is not world:
        _made[:] = [_Made(world)]
        at_leave(_forget)
    return _made[0]


def _forget() -> None:
    """End the channels' threads; the groups end with the default one."""
    for made in _made:
        for channels in made.channels.values():
            channels.close()
    _made.clear()
