"""What the verb `calibrate` measures, in its order: launches, the host, rates; rank 0 writes the cluster file."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

import torch
import typer

from ...planner.cost.cluster import Cluster
from ...planner.cost.constants import HostPrices
from ...planner.schedule.backends import facts_of
from ...planner.schedule.schedule import DIRECTIONS
from ...traces.files import write_atomically
from ...traces.progress import Progress, shown_progress
from ..comm.mesh import Mesh
from .cases import calibration_cases
from .cluster_file import calibrated, cluster_yaml
from .host import LayerHost
from .links import LinkTimes
from .machine import measure_rates
from .points import draw, measure
from .raw import RawPoints, Shape

SECONDS_OF_A_CASE = 2.2
GPU_TOKENS, CPU_TOKENS = 262144, 4096


def measure_rest(
    mesh: Mesh, base: Cluster, shapes: Sequence[Shape], raw: RawPoints, output: Path, longest: int | None,
    layer_us: LayerHost | None,
) -> None:  # fmt: skip
    """Measure launches and rates, as the one rank that does, and write the cluster file.

    longest: tokens; None: as usual. layer_us: what the host takes for a layer, which ranks measure together; None: not.
    """
    on_gpu = mesh.device.type == "cuda"
    raw.save()
    by_transport = {one["transport"]: LinkTimes(**one) for one in raw.links}
    with shown_progress() as progress:
        _measure_launches(raw, shapes, mesh.device, longest or (GPU_TOKENS if on_gpu else CPU_TOKENS), progress)
    host = None if layer_us is None else _host(layer_us, shapes[0], raw, by_transport)
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


def _host(layer_us: LayerHost, shape: Shape, raw: RawPoints, links: dict[str, LinkTimes]) -> HostPrices:
    """Return what the host takes for a layer beside its launches, and for a call."""
    launched = {
        direction: statistics.median(
            point.fresh_host_us
            for point in raw.of_shape(shape)
            if point.direction == direction and not point.mask.listed and not point.mask.documents
        )
        for direction in DIRECTIONS
    }
    return HostPrices(
        forward_layer=max(0.0, layer_us.forward - launched["forward"]),
        backward_layer=max(0.0, layer_us.backward - launched["backward"]),
        call=links["p2p"].post_us if "p2p" in links else 0.0,
    )
