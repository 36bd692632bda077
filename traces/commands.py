"""The verbs that make and show traces: `sparsering synthesize` and `sparsering inspect`. No torch is needed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from .dataset.store import Trace
from .errors import InputError
from .pattern import BLOCK_SIZES
from .stats import describe, summarize
from .synthetic import GENERATORS, SyntheticSettings, write_synthetic_trace

JsonOption = Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")]


def synthesize(
    kind: Annotated[str, typer.Argument(help=", ".join(GENERATORS))],
    output: Annotated[Path, typer.Option("--output", "-o", help="Trace folder; one that exists is continued.")],
    seq_len: Annotated[int, typer.Option(min=1, help="Tokens of the sequence.")] = 131072,
    block_size: Annotated[int, typer.Option(help="Tokens of a mask block: 64 or 128.")] = 128,
    heads: Annotated[int, typer.Option(min=1, help="Query heads.")] = 16,
    kv_heads: Annotated[int | None, typer.Option(min=1, help="Key/value heads.", show_default="heads / 8")] = None,
    head_dim: Annotated[int, typer.Option(min=1, help="Head dimension.")] = 128,
    layers: Annotated[int, typer.Option(min=1, help="Layers.")] = 1,
    steps: Annotated[int, typer.Option(min=1, help="Training steps.")] = 1,
    density: Annotated[float, typer.Option(help="Share of active causal blocks.")] = 0.05,
    columns: Annotated[int, typer.Option(min=0, help="Token columns per head.")] = 1024,
    chunk: Annotated[int, typer.Option(min=1, help="moba-block: tokens of a key chunk.")] = 512,
    sinks: Annotated[int, typer.Option(min=0, help="sink-window: first tokens kept.")] = 30,
    window: Annotated[int, typer.Option(min=1, help="sink-window: nearest tokens kept.")] = 1024,
    skew: Annotated[float, typer.Option(help="skewed: how many times denser the dense heads are.")] = 8.0,
    document: Annotated[int, typer.Option(min=1, help="packed-documents: tokens of an average one.")] = 4096,
    seed: Annotated[int, typer.Option(min=0, help="Equal seeds give equal traces.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Write a synthetic trace: patterns of a known kind, drawn from a seed."""
    if block_size not in BLOCK_SIZES:
        raise InputError(f"is {block_size}, must be 64 or 128", field="--block-size")
    settings = SyntheticSettings(
        seq_len_tokens=seq_len, heads=heads, block_size=block_size, density=density, columns=columns,
        chunk_tokens=chunk, sink_tokens=sinks, window_tokens=window, skew=skew, mean_document_tokens=document,
    )  # fmt: skip
    trace = write_synthetic_trace(
        output, kind, settings, layers=layers, steps=steps, seed=seed, kv_heads=kv_heads, head_dim=head_dim
    )
    _show(trace, as_json)


def inspect(
    trace: Annotated[Path, typer.Argument(help="Trace folder.")],
    as_json: JsonOption = False,
) -> None:
    """Check every byte of a trace and show what it holds."""
    opened = Trace.open(trace)
    opened.verify()
    _show(opened, as_json)


def _show(trace: Trace, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(describe(trace), indent=1))
    else:
        print_trace(trace)


def print_trace(trace: Trace) -> None:
    """Print a few lines on the whole trace and one row per layer to standard output."""
    header = trace.header
    shape = f"{header.model.layers} layers × {header.model.heads} heads ({header.model.kv_heads} KV)"
    size = sum(part.bytes for part in trace.manifest.parts)
    typer.echo(f"{trace.folder}: {header.origin}, {header.model.model_id}, {shape}, D = {header.model.head_dim}")
    typer.echo(
        f"{header.seq_len_tokens} tokens in blocks of {header.block_size}; {len(trace.steps)} training steps, "
        f"{size / 1000:.1f} kB, digest {trace.digest()[:12]}"
    )
    for name in trace.unlisted_parts:
        typer.echo(f"ignored, not listed in the manifest: {name}")
    if trace.steps:
        Console().print(_layer_table(trace))


def _layer_table(trace: Trace) -> Table:
    """One row per layer; probe, sampled and lowest (sampled) are shares of attention kept."""
    table = Table(box=None, pad_edge=False, caption="probe, sampled, lowest: share of attention kept")
    for name in ("layer", "density", "min", "max", "columns", "probe", "sampled", "lowest", "selector"):
        table.add_column(name, justify="left" if name == "selector" else "right", no_wrap=True)
    for row in summarize(trace):
        densities = [f"{row[f'density_{name}']:.3f}" for name in ("mean", "min", "max")]
        masses = [row[f"kept_mass_{name}"] for name in ("probe_mean", "sampled_mean", "sampled_min")]
        shares = ["" if mass is None else f"{mass:.3f}" for mass in masses]
        table.add_row(str(row["layer"]), *densities, f"{row['columns_mean']:.0f}", *shares, ", ".join(row["selectors"]))
    return table
