"""The verbs that make and show traces: `sparsering synthesize` and `sparsering inspect`. No torch is needed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from .dataset.store import Trace
from .errors import InputError
from .output import Table, say, show
from .pattern import BLOCK_SIZES
from .progress import shown_progress
from .reach import FAR_TOKENS, reach_tables, trace_reaches
from .stats import describe, kept_of_documents, summarize
from .synthetic import GENERATORS, SyntheticSettings, write_synthetic_trace

MOST_DOCUMENTS = 12  # that are shown
JsonOption = Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")]


def synthesize(
    kind: Annotated[str, typer.Argument(help=", ".join(GENERATORS), autocompletion=lambda: list(GENERATORS))],
    output: Annotated[Path, typer.Option("--output", "-o", help="Trace folder; one that exists is continued.")],
    seq_len: Annotated[int, typer.Option(min=1, help="Tokens of the sequence.")] = 131072,
    block_size: Annotated[int, typer.Option(help="Tokens of a mask block: 64 or 128.")] = 128,
    heads: Annotated[int, typer.Option(min=1, help="Query heads.")] = 16,
    kv_heads: Annotated[int | None, typer.Option(min=1, help="Key/value heads.", show_default="heads / 8")] = None,
    head_dim: Annotated[int, typer.Option(min=1, help="Head dimension.")] = 128,
    layers: Annotated[int, typer.Option(min=1, help="Layers.")] = 1,
    steps: Annotated[int, typer.Option(min=1, help="Training steps, those that the trace has included.")] = 1,
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
    with shown_progress() as progress:
        trace = write_synthetic_trace(
            output, kind, settings, layers=layers, steps=steps, seed=seed, kv_heads=kv_heads, head_dim=head_dim,
            progress=progress,
        )  # fmt: skip
    _show(trace, as_json)


def inspect(
    trace: Annotated[Path, typer.Argument(help="Trace folder.")],
    reach: Annotated[
        bool,
        typer.Option(
            "--reach", help="Also the share of keys that no far query attends: they get no gradient from there."
        ),
    ] = False,
    far: Annotated[
        list[int] | None,
        typer.Option(
            min=0,
            help="With --reach: queries more than so many tokens later are far; can be given several times.",
            show_default=", ".join(map(str, FAR_TOKENS)),
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Check every byte of a trace and show what it holds."""
    if far and not reach:
        raise InputError("goes with --reach", field="--far")
    _show(Trace.open(trace), as_json, (far or FAR_TOKENS) if reach else ())


def _show(trace: Trace, as_json: bool, far_tokens: Sequence[int] = ()) -> None:
    """Read, and so check, every row of the trace, and print what it holds. far_tokens: distances of reach, if any."""
    if as_json:
        with shown_progress() as progress:
            described = describe(trace, progress=progress)
            reach = {"reach": list(trace_reaches(trace, far_tokens, progress=progress))} if far_tokens else {}
        typer.echo(json.dumps(described | reach, indent=1))
        return
    print_trace(trace)
    if far_tokens and trace.steps:
        with shown_progress() as progress:
            tables = reach_tables(list(trace_reaches(trace, far_tokens, progress=progress)))
        for table in tables:
            show(table)


def print_trace(trace: Trace) -> None:
    """Check a trace and print to standard output what it is, a few lines about it, and a row for each layer."""
    with shown_progress() as progress:
        layers = summarize(trace, progress=progress) if trace.steps else []
    header, size = trace.header, sum(part.bytes for part in trace.manifest.parts)
    say(_answer(trace, layers), answer=True)
    shape = f"{header.model.layers} layers × {header.model.heads} query heads ({header.model.kv_heads} K/V heads)"
    say(
        f"{trace.folder}: {header.origin}, of {header.model.model_id}, {shape}, head dimension {header.model.head_dim}",
        f"{header.seq_len_tokens:,} tokens in blocks of {header.block_size}; {len(trace.steps)} training steps, "
        f"{size / 1e6:,.3f} MB, digest {trace.digest()[:12]}",
        *(f"ignored, not listed in the manifest: {name}" for name in trace.unlisted_parts),
    )
    if layers:
        show(_layer_table(layers))
    if documents := kept_of_documents(trace):
        show(_document_table(documents))


def _answer(trace: Trace, layers: list[dict[str, Any]]) -> str:
    """Return one line: that the trace is whole, and how much of all attention it holds."""
    if not layers:
        return "Whole, but it holds no training step yet."
    heads = len(layers) * trace.header.model.heads * len(trace.steps)
    mean = sum(row["density_mean"] for row in layers) / len(layers)
    low, high = min(row["density_min"] for row in layers), max(row["density_max"] for row in layers)
    masses = [row["kept_mass_sampled_mean"] for row in layers if row["kept_mass_sampled_mean"] is not None]
    kept = f", which keep {sum(masses) / len(masses):.1%} of the attention" if masses else ""
    return (
        f"Whole: every byte agrees with its digest. {heads:,} recorded heads attend {mean:.1%} of all causal blocks in "
        f"the mean (from {low:.1%} to {high:.1%}){kept}."
    )


def _document_table(documents: list[dict[str, Any]]) -> Table:
    """The packed documents of which least is kept, a row each."""
    least = sorted(documents, key=lambda one: one["kept_mass_mean"])[:MOST_DOCUMENTS]
    names = ("training_step", "document", "first_token", "tokens")
    return Table(
        columns=("step", "document", "first token", "tokens", "kept", "least kept"),
        rows=[
            (*(f"{one[name]:,}" for name in names), f"{one['kept_mass_mean']:.1%}", f"{one['kept_mass_min']:.1%}")
            for one in least
        ],
        note=f"the {len(least)} of {len(documents):,} packed documents of which least is kept; kept: share of the "
        "attention of a document's last queries, mean of all layers and heads that choose; least: of any of them",
    )


def _layer_table(layers: list[dict[str, Any]]) -> Table:
    """One row per layer; columns about kept attention only where it was measured."""
    masses = {
        name: key
        for name, key in (
            ("kept (probe)", "kept_mass_probe_mean"),
            ("kept (sampled)", "kept_mass_sampled_mean"),
            ("least kept", "kept_mass_sampled_min"),
        )
        if any(row[key] is not None for row in layers)
    }
    rows = []
    for row in layers:
        densities = [f"{row[f'density_{name}']:.1%}" for name in ("mean", "min", "max")]
        shares = ["" if row[key] is None else f"{row[key]:.1%}" for key in masses.values()]
        selectors = ", ".join(row["selectors"])
        rows.append((str(row["layer"]), *densities, f"{row['columns_mean']:,.0f}", *shares, selectors))
    note = "density: active causal blocks, mean, lowest and highest of the heads; columns: tokens that all later attend"
    kept = "; kept: share of attention, for the queries that chose (probe) and for sampled ones; least: of any head"
    return Table(
        columns=("layer", "density", "min", "max", "columns", *masses, "selector"),
        rows=rows,
        note=note + (kept if masses else ""),
        text=("selector",),
    )
