"""The cluster that a command was given: read, with a word on stderr about rates that are hardly meant."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import typer

from ..traces.errors import InputError
from .cost.cluster import Cluster, load_cluster, preset_names

ClusterOption = Annotated[
    str, typer.Option(help=f"YAML file or preset: {', '.join(preset_names())}.", autocompletion=preset_names)
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", help="Change the cluster, as gpu.memory_bytes=80e9; may be repeated.", show_default=False),
]

SLOW_LINK_BYTES_PER_US = 100.0  # 100 MB/s: less than a gigabit Ethernet card
SLOW_GPU_FLOPS_PER_US = 10e3  # 10 GFLOP/s: less than one processor core


def chosen_cluster(name_or_path: str | Path, settings: Sequence[str] | None = None) -> Cluster:
    """Read a cluster from a YAML file or by preset name, and warn on stderr, a line for each of its `doubts`.

    settings: what `--set` gave, see `SetOption`.
    """
    cluster = load_cluster(name_or_path, settings or ())
    for doubt in doubts(cluster):
        typer.echo(f"warning: {name_or_path}: {doubt}", err=True)
    return cluster


def doubts(cluster: Cluster) -> Iterator[str]:
    """Yield what looks like a wrong unit: links below 100 MB/s, a GPU below 10 GFLOP/s."""
    for place, link in (("intra_node", cluster.intra_node), ("inter_node", cluster.inter_node)):
        if link is not None and (slow := link.bandwidth_bytes_per_us) < SLOW_LINK_BYTES_PER_US:
            yield f"{place}.bandwidth_bytes_per_us: {slow:g} is {slow:g} MB/s"
    if (slow := cluster.gpu.peak_flops_per_us) < SLOW_GPU_FLOPS_PER_US:
        yield f"gpu.peak_flops_per_us: {slow:g} is {slow / 1e3:g} GFLOP/s"


def require_cluster_output(path: Path) -> None:
    """Refuse, before any work, to write a cluster in the place of something else: InputError names it."""
    if path.suffix not in (".yaml", ".yml"):
        raise InputError("must end in .yaml", source=path)
    if path.is_dir():
        raise InputError("cannot be written: is a folder", source=path)
    if path.exists() and path.stat().st_size:
        try:
            load_cluster(path)
        except InputError as error:
            raise InputError("exists and is no cluster file: it is not overwritten", source=path) from error
