"""The verb `sparsering data`: text to the token shards that `sparsering train` reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from ...traces.progress import shown_progress
from .shards import MAX_ALIGN_TOKENS, TokenData
from .writer import SHARD_TOKENS, byte_tokenizer, model_tokenizer, write_data


def data(
    inputs: Annotated[list[Path], typer.Argument(help="Text, .jsonl or .npy files, or folders of them.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The new data folder.")],
    tokenizer: Annotated[Path | None, typer.Option(help="Model folder whose tokenizer is used, not bytes.")] = None,
    text_field: Annotated[str, typer.Option(help="Where the text of a JSON line is.")] = "text",
    shard_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a shard, at least.")] = SHARD_TOKENS,
    align: Annotated[
        int,
        typer.Option(
            min=1,
            max=MAX_ALIGN_TOKENS,
            help="Documents begin at multiples of so many tokens, a plan's "
            "blocks; padding, which no loss counts, fills the rest.",
        ),
    ] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print figures as JSON.")] = False,
) -> None:
    """Turn text into memory-mapped token shards with digests, document boundaries kept.

    A file is a document, and so is a line of a .jsonl file and an array of token ids (.npy). Exit code 2 with one line
    when an input cannot be used.
    """
    chosen = byte_tokenizer() if tokenizer is None else model_tokenizer(tokenizer)
    with shown_progress() as progress:
        write_data(
            inputs, output, chosen, text_field=text_field, shard_tokens=shard_tokens, align_tokens=align,
            progress=progress,
        )  # fmt: skip
    written = TokenData.open(output)
    manifest = written.manifest
    figures = {
        "folder": str(output), "tokens": written.tokens, "documents": written.documents,
        "shards": len(manifest.shards), "tokenizer": manifest.tokenizer, "vocabulary": manifest.vocabulary,
        "digest": manifest.digest,
    }  # fmt: skip
    if as_json:
        typer.echo(json.dumps(figures))
        return
    for name, value in figures.items():
        typer.echo(f"{name:<10} {value}")
