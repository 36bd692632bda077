"""The verb `calibrate`: measure this machine's kernels and links, and write them as a cluster file."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import torch
import typer

from ...planner.chosen_cluster import chosen_cluster
from ...planner.cost.cluster import Cluster, preset_names
from ...planner.cost.tables import HostPrices
from ...planner.schedule.backends import facts_of
from ...planner.schedule.schedule import DIRECTIONS
from ...traces.errors import InputError, UnsupportedError
from ...traces.files import write_atomically
from ...traces.progress import Progress, shown_progress
from ..comm.mesh import Mesh, inherited_environment, is_rank, join_or_be_alone, leave
from ..comm.start import start_ranks
from .cases import calibration_cases
from .cluster_file import calibrated, cluster_yaml
from .host import layer_host_us
from .links import LinkTimes, measure_links
from .machine import machine_facts, measure_rates
from .points import draw, measure
from .raw import RawPoints, Shape

SECONDS_OF_A_CASE = 1.2
TIMEOUT_S = 3600.0
GPU_TOKENS, CPU_TOKENS = 262144, 4096


def calibrate(
    output: Annotated[Path, typer.Option("--output", "-o", help="The cluster file to write (.yaml).")],
    cluster: Annotated[
        str,
        typer.Option(help=f"What is not measured comes from here: a YAML file or {', '.join(preset_names())}."),
    ],
    heads: Annotated[str, typer.Option(help="Query and K/V heads of a layer; several with commas.")] = "16:2",
    head_dim: Annotated[int, typer.Option(min=1, help="Elements of a head.")] = 128,
    block_size: Annotated[int, typer.Option(min=1, help="Tokens of a mask block.")] = 128,
    backend: Annotated[str, typer.Option(help="Kernels; several with commas. On CPUs: blockwise.")] = "triton",
    gpus: Annotated[int, typer.Option(min=1, max=2, help="2: links too, between two processes on CPUs.")] = 1,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default: cuda where there is one.")] = None,
    longest_tokens: Annotated[
        int | None, typer.Option(min=1024, help="No longer sequences; default: 262144, on CPUs 4096.")
    ] = None,
) -> None:
    """Measure what launches, indexes, the host and links cost here; write a cluster file that plans can use.

    The points go to a file beside it (.points.json): a calibration that was stopped goes on from there. A later one,
    with --cluster this file, adds other heads or backends.
    """
    base, shapes = chosen_cluster(cluster), _shapes(heads, head_dim, block_size, backend)
    if output.suffix not in (".yaml", ".yml"):
        raise InputError("must end in .yaml", source=output)
    if gpus == 2 and not is_rank():
        raise typer.Exit(_start_two())
    mesh = join_or_be_alone(device=device, timeout_s=TIMEOUT_S)
    try:
        if mesh.world_size == 2 and mesh.device.type == "cuda":
            raise UnsupportedError(
                "links between GPUs are not measured: give nccl-tests' table to `sparsering cluster`", field="gpus"
            )
        raw = RawPoints.open(output.with_suffix(".points.json"), machine_facts(mesh.device))  # all ranks refuse alike
        if mesh.world_size == 2:
            raw.links = [asdict(one) for one in measure_links(mesh)]
        try:
            if mesh.rank == 0:
                _measure_rest(mesh, base, shapes, raw, output, longest_tokens)
        finally:
            mesh.broadcast("calibration is over", None)  # the other rank waits here, whatever became of the rest
    finally:
        leave()


def _start_two() -> int:
    return start_ranks(sys.argv[1:], world_size=2, environment=inherited_environment(world_size=2))


def _shapes(heads: str, head_dim: int, block_size: int, backends: str) -> list[Shape]:
    shapes = []
    for name in backends.split(","):
        facts_of(name)
        for text in heads.split(","):
            query, _, key = text.partition(":")
            if not (query.isdecimal() and key.isdecimal() and int(key) and int(query) % int(key) == 0):
                raise InputError(f"{text!r} is not query and K/V heads, as 16:2", field="heads")
            shape = Shape(backend=name, heads=int(query), kv_heads=int(key), head_dim=head_dim, block_size=block_size)
            shapes.append(shape)
    return shapes


def _measure_rest(
    mesh: Mesh, base: Cluster, shapes: Sequence[Shape], raw: RawPoints, output: Path, longest: int | None
) -> None:
    on_gpu = mesh.device.type == "cuda"
    raw.save()
    by_transport = {one["transport"]: LinkTimes(**one) for one in raw.links}
    with shown_progress() as progress:
        _measure_launches(raw, shapes, mesh.device, longest or (GPU_TOKENS if on_gpu else CPU_TOKENS), progress)
    host = _host(mesh, shapes[0], raw, by_transport) if on_gpu else None
    found = calibrated(base, raw, shapes, rates=measure_rates(mesh.device), host=host, links=by_transport)
    write_atomically(output, cluster_yaml(found).encode())
    for table in found.calibration.tables if found.calibration else ():
        typer.echo(
            f"{table.backend} {table.direction:8} {table.points:3} launches of "
            f"{'listed blocks' if table.listed else 'diagonals'}{' in documents' if table.documents else ''}: "
            f"error {table.median_error:.1%} in the median, {table.largest_error:.1%} at most"
        )
    typer.echo(f"{output}: {found.name}")


def _measure_launches(
    raw: RawPoints, shapes: Sequence[Shape], device: torch.device, longest_tokens: int, progress: Progress
) -> None:
    """Measure every case that is not in the file yet."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    wanted = [
        (shape, case)
        for shape in shapes
        for case in calibration_cases(longest_tokens=longest_tokens, joins_keys=facts_of(shape.backend).joins_keys)
    ]
    missing = [(shape, case) for shape, case in wanted if not raw.has(shape, case)]
    if device.type == "cuda" and missing:
        typer.echo(f"{len(missing)} launches to measure, about {len(missing) * SECONDS_OF_A_CASE:.0f} s", err=True)
    for done, (shape, case) in enumerate(missing):
        progress("launches", done, len(missing))
        drawn = draw(case, shape.model, shape.block_size, device)
        raw.add(shape, case, measure(drawn, shape.model, shape.backend, dtype))


def _host(mesh: Mesh, shape: Shape, raw: RawPoints, links: dict[str, LinkTimes]) -> HostPrices:
    """Return what the host takes for a layer beside its launches, and for a call. mesh: this rank is played alone."""
    launched = {
        direction: statistics.median(
            point.fresh_host_us
            for point in raw.of_shape(shape)
            if point.direction == direction and not point.mask.listed and not point.mask.documents
        )
        for direction in DIRECTIONS
    }
    forward, backward = layer_host_us(mesh.replica_of(1), shape)
    return HostPrices(
        forward_layer=max(0.0, forward - launched["forward"]),
        backward_layer=max(0.0, backward - launched["backward"]),
        call=links["p2p"].post_us if "p2p" in links else 0.0,
    )
