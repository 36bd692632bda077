"""The verb `cluster`: a cluster file from what `nvidia-smi topo -m` and nccl-tests print."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from ..traces.errors import InputError
from ..traces.files import write_atomically
from ..traces.yaml_files import yaml_text
from .chosen_cluster import chosen_cluster, doubts, require_cluster_output
from .cost.cluster import preset_names
from .importing.cluster_file import imported_cluster
from .importing.nccl_tests import TESTS, read_nccl_table
from .importing.topology import read_topology


def cluster(
    output: Annotated[Path, typer.Option("--output", "-o", help="Where to write the cluster (.yaml).")],
    base: Annotated[
        str,
        typer.Option(
            help=f"Says what the texts do not: a YAML file or {', '.join(preset_names())}.", autocompletion=preset_names
        ),
    ],
    topology: Annotated[Path | None, typer.Option(help="What `nvidia-smi topo -m` printed.")] = None,
    nccl_tests: Annotated[
        list[Path] | None,
        typer.Option(help="What a test of nccl-tests printed; once for links in a node, once for those between."),
    ] = None,
    test: Annotated[
        str | None, typer.Option(help=f"Which test it was, where the text does not say: {', '.join(TESTS)}.")
    ] = None,
    nodes: Annotated[int | None, typer.Option(min=1, help="How many; default: as many as the base has.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Write a cluster file from what `nvidia-smi topo -m` and nccl-tests print, on top of a preset.

    The topology gives GPUs and network cards of a node, the tables the latency and bandwidth of links. Everything else
    is the base's, and said so, in a line each.
    """
    if topology is None and not nccl_tests:
        raise InputError("give --topology, --nccl-tests or both: without them there is nothing to import")
    require_cluster_output(output)
    rest = chosen_cluster(base)
    node = None if topology is None else read_topology(topology)
    tables = [(path, read_nccl_table(path, test=test)) for path in nccl_tests or []]
    made = imported_cluster(rest, node, tables, name=output.stem, nodes=nodes)
    write_atomically(output, yaml_text(made.cluster.model_dump(mode="json", exclude_none=True)).encode())
    if as_json:
        typer.echo(json.dumps({"cluster": str(output), "origin": made.cluster.origin, "lines": made.lines}))
    else:
        typer.echo("\n".join([*made.lines, f"wrote {output} ({made.cluster.origin})"]))
    for doubt in doubts(made.cluster):
        typer.echo(f"warning: {output}: {doubt}", err=True)
