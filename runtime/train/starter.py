"""A first configuration for a model folder and a data folder: what `sparsering train --init` writes."""

from __future__ import annotations

import json
from pathlib import Path
from string import Template
from typing import Any

import torch

from ...kernels.select import DEFAULT_SELECTOR
from ...traces.errors import InputError
from ...traces.files import write_atomically
from ..data.shards import TokenData
from ..model.load import read_config
from .config import load_config
from .setup import Setup, set_up

TEMPLATE = Path(__file__).parent.parent / "templates" / "config.yaml"
LEAST_SEQ_LEN_TOKENS = 256
FROM_SCRATCH, FINE_TUNING = "3.0e-4", "1.0e-5"


def write_starter(model: Path, data: Path, output: Path) -> Setup:
    """Write a commented configuration for this host and return the run that it describes, checked as a dry run is.

    The sequence is as long as the model was made for and the data allow; all GPUs of the host share it, two processes
    where there is none. InputError, with nothing written, when a file is in the way or the run cannot be.
    """
    if output.suffix not in (".yaml", ".yml"):
        raise InputError("must end in .yaml", source=output)
    if output.exists():
        raise InputError("exists: it is not overwritten", source=output)
    folder, config = read_config(model)
    tokens = TokenData.open(data)
    seq_len_tokens, reason = _length(config, tokens)
    gpus = torch.cuda.device_count()
    random_weights = not list(folder.glob("*.safetensors"))
    values = {
        "model": _path(model, output),
        "random_weights": json.dumps(random_weights),
        "data": _path(data, output),
        "sequences": f"{tokens.sequences(seq_len_tokens):,}",
        "seq_len_tokens": seq_len_tokens,
        "length_reason": reason,
        "selector": DEFAULT_SELECTOR,
        "context": gpus or 2,
        "context_reason": "all GPUs of this host" if gpus else "there is no GPU here, two processes on CPUs",
        "dtype": "bfloat16" if gpus else "float32",
        "learning_rate": FROM_SCRATCH if random_weights else FINE_TUNING,
        "rate_reason": "for training from random weights" if random_weights else "for weights that are trained already",
    }
    text = Template(TEMPLATE.read_text(encoding="utf-8")).substitute(values)
    write_atomically(output, text.encode())
    try:
        return set_up(load_config(output), verify_data=False)
    except BaseException:
        output.unlink(missing_ok=True)
        raise


def _length(config: Any, data: TokenData) -> tuple[int, str]:
    """Return tokens of a sequence, a power of two, and why so many."""
    longest = getattr(config, "max_position_embeddings", None) or data.tokens
    bound = min(int(longest), data.tokens)
    if bound < LEAST_SEQ_LEN_TOKENS:
        told = (
            f"{data.tokens} tokens of data, a model for {longest}: at least {LEAST_SEQ_LEN_TOKENS} of both are needed"
        )
        raise InputError(told, source=data.folder)
    why = "the model's longest context" if bound == longest else "as far as the data reach"
    rounded = 1 << (bound.bit_length() - 1)
    return rounded, why if rounded == bound else f"{why}, rounded down to a power of two"


def _path(path: Path, output: Path) -> str:
    """Return a path as the file states it: relative where it lies below the file's folder. Quoted as YAML is."""
    there, base = path.resolve(), output.parent.resolve()
    return json.dumps(str(there.relative_to(base) if there.is_relative_to(base) else there))
