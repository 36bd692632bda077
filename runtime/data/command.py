"""The verb `sparsering data`: text to the token shards that `sparsering train` reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from ...planner.spawned import available_cores
from ...traces.errors import InputError
from ...traces.progress import shown_progress
from .reading import TEXT_SUFFIXES, Join, Wanted
from .shards import MAX_ALIGN_TOKENS, TokenData
from .writer import SHARD_TOKENS, Outputs, Shape, byte_tokenizer, model_tokenizer, write_folders


def data(
    inputs: Annotated[list[Path], typer.Argument(help="Text, .jsonl or .npy files, or folders of them.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The new data folder.")],
    tokenizer: Annotated[Path | None, typer.Option(help="Model folder whose tokenizer is used, not bytes.")] = None,
    text_field: Annotated[str, typer.Option(help="Where the text of a JSON line is.")] = "text",
    join: Annotated[
        Join,
        typer.Option(
            help="folders: the text files that lie directly in one folder are one document, in the order of "
            "names, each followed by a newline. none: a file is a document."
        ),
    ] = "none",
    suffix: Annotated[
        list[str] | None,
        typer.Option(
            help="How names of text files in folders end, instead of the usual ones; can be given several times.",
            show_default=", ".join(TEXT_SUFFIXES),
        ),
    ] = None,
    hold_out: Annotated[
        list[str] | None,
        typer.Option(
            help="Files for --held-out-output: a pattern of their paths below the input folder, drivers/gpu/* say, "
            "in which * stands for slashes too; can be given several times."
        ),
    ] = None,
    held_out_output: Annotated[Path | None, typer.Option(help="The new data folder for --hold-out.")] = None,
    skip_unreadable: Annotated[
        bool,
        typer.Option(
            "--skip-unreadable", help="Leave out, and count, files that cannot be read or are no UTF-8; else refuse."
        ),
    ] = False,
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
    workers: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Processes that tokenise, where there is much; what they write does not depend on it.",
            show_default="the cores that are free to use",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print figures as JSON.")] = False,
) -> None:
    """Turn text into memory-mapped token shards with digests, document boundaries kept.

    A file is a document, and so is a line of a .jsonl file and an array of token ids (.npy). Exit code 2 with one line
    when an input cannot be used.
    """
    if bool(hold_out) != (held_out_output is not None):
        missing = "--held-out-output, the folder for what is held out" if hold_out else "--hold-out, what goes there"
        raise InputError(f"goes with {missing}", field="--hold-out" if hold_out else "--held-out-output")
    chosen = byte_tokenizer() if tokenizer is None else model_tokenizer(tokenizer)
    wanted = Wanted(text_field=text_field, suffixes=tuple(suffix or TEXT_SUFFIXES), join=join,
                    hold_out=tuple(hold_out or ()), skip_unreadable=skip_unreadable)  # fmt: skip
    shape = Shape(shard_tokens=shard_tokens, align_tokens=align, workers=workers or available_cores())
    outputs = Outputs(folder=output, held_out=held_out_output)
    with shown_progress() as progress:
        written = write_folders(inputs, outputs, chosen, wanted=wanted, shape=shape, progress=progress)
    skipped = written.skipped
    if skipped.files:
        typer.echo(f"sparsering: {skipped.files} files were left out, the first: {skipped.first}", err=True)
    figures = _figures(output) | ({"skipped_files": skipped.files} if skip_unreadable else {})
    held_out = {} if held_out_output is None else {"held_out": _figures(held_out_output)}
    if as_json:
        typer.echo(json.dumps(figures | held_out))
        return
    for one in (figures, *held_out.values()):
        for name, value in one.items():
            typer.echo(f"{name:<13} {value}")


def _figures(folder: Path) -> dict[str, Any]:
    """Return what is told of a data folder."""
    written = TokenData.open(folder)
    manifest = written.manifest
    lengths = written.document_tokens()
    return {
        "folder": str(folder), "tokens": written.tokens, "documents": written.documents,
        "longest": int(lengths.max()), "shards": len(manifest.shards), "tokenizer": manifest.tokenizer,
        "vocabulary": manifest.vocabulary, "digest": manifest.digest,
    }  # fmt: skip
