"""The verb `calibrate`: measure this machine's kernels and links, and write them as a cluster file."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ...planner.chosen_cluster import chosen_cluster, require_cluster_output
from ...planner.cost.cluster import preset_names
from ...planner.schedule.backends import facts_of
from ...traces.errors import InputError

if TYPE_CHECKING:
    from .raw import Shape

TIMEOUT_S = 3600.0


def calibrate(
    output: Annotated[Path, typer.Option("--output", "-o", help="The cluster file to write (.yaml).")],
    cluster: Annotated[
        str,
        typer.Option(
            help=f"What is not measured comes from here: a YAML file or {', '.join(preset_names())}.",
            autocompletion=preset_names,
        ),
    ],
    heads: Annotated[str, typer.Option(help="Query and K/V heads of a layer; several with commas.")] = "16:2",
    head_dim: Annotated[int, typer.Option(min=1, help="Elements of a head.")] = 128,
    block_size: Annotated[int, typer.Option(min=1, help="Tokens of a mask block.")] = 128,
    backend: Annotated[str, typer.Option(help="Kernels; several with commas. On CPUs: blockwise.")] = "triton",
    gpus: Annotated[int, typer.Option(min=1, max=2, help="2: the link between two GPUs, too.")] = 1,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default: cuda where there is one.")] = None,
    longest_tokens: Annotated[
        int | None, typer.Option(min=1024, help="No longer sequences; default: 262144, on CPUs 4096.")
    ] = None,
) -> None:
    """Measure what launches, indexes, the host and links cost here; write a cluster file that plans can use.

    The points go to a file beside it (.points.json): a calibration that was stopped goes on from there. A later one,
    with --cluster this file, adds other heads or backends.
    """
    from ..attention.here import require_backend_here  # torch is imported to measure, not to list the verb
    from ..comm.mesh import is_rank, join_or_be_alone, leave, usual_device
    from .host import layer_host_us
    from .links import measure_links
    from .machine import machine_facts
    from .measuring import measure_rest
    from .raw import RawPoints

    base, shapes = chosen_cluster(cluster), _shapes(heads, head_dim, block_size, backend)
    require_cluster_output(output)
    used = device or usual_device()
    for shape in shapes:
        require_backend_here(shape.backend, device=used, field="--backend")
    if gpus == 2 and not is_rank():
        raise typer.Exit(_start_two())
    mesh = join_or_be_alone(device=device, timeout_s=TIMEOUT_S)
    try:
        raw = RawPoints.open(output.with_suffix(".points.json"), machine_facts(mesh.device))  # all ranks refuse alike
        if mesh.world_size == 2:
            raw.links = [asdict(one) for one in measure_links(mesh)]
        layer_us = layer_host_us(mesh, shapes[0]) if mesh.device.type == "cuda" else None
        try:
            if mesh.rank == 0:
                measure_rest(mesh, base, shapes, raw, output, longest_tokens, layer_us)
        finally:
            mesh.broadcast("calibration is over", None)  # the other rank waits here, whatever became of the rest
    finally:
        leave()


def _start_two() -> int:
    from ..comm.mesh import inherited_environment
    from ..comm.start import start_ranks

    return start_ranks(sys.argv[1:], world_size=2, environment=inherited_environment(world_size=2))


def _shapes(heads: str, head_dim: int, block_size: int, backends: str) -> list[Shape]:
    from .raw import Shape

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
