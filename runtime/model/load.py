"""Models and text from local files only: no hub, no remote code, no pickled weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from ...traces.errors import InputError, shown, unknown_name
from ...traces.files import read_bytes
from .config_file import read_config_file, told
from .rope import replace_rope

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
MAX_TEXT_BYTES = 1 << 30


def pick_device(name: str) -> torch.device:
    """Return the device called "cpu", "cuda", "cuda:1", …, or for "auto" the GPU where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"{shown(name)} is none of auto, cpu, cuda, cuda:0, …", field="device") from error
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"{shown(name)} is none of auto, cpu, cuda, cuda:0, …", field="device")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"{name!r} is not here: {torch.cuda.device_count()} CUDA devices", field="device")
    return device


def load_model(
    path: Path | str, *, random_weights: bool, device: torch.device, dtype: str = "auto", seed: int = 0,
    rope_parameters: Mapping[str, Any] | None = None,
) -> PreTrainedModel:  # fmt: skip
    """Return a causal LM from a folder (config.json and safetensors) or, with random_weights, from a config alone.

    dtype "auto" is the model's own on a GPU and float32 on a CPU. Random weights depend on `seed` only.
    rope_parameters: take the place of the configuration's.
    Raises InputError when the files are missing or are no causal LM.
    """
    folder, config = read_config(Path(path))
    if rope_parameters is not None:
        replace_rope(config, rope_parameters, source=folder)
    if dtype != "auto" and dtype not in DTYPES:
        raise unknown_name(dtype, ("auto", *DTYPES), field="dtype")
    stated = getattr(config, "dtype", None) or torch.float32
    chosen = DTYPES.get(dtype) or (stated if device.type == "cuda" else torch.float32)
    if not random_weights:
        if not list(folder.glob("*.safetensors")):
            raise InputError("holds no safetensors weights (a config alone needs random weights)", source=folder)
        model: Any = pretrained(folder, config, dtype=chosen)
    else:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            try:
                model = AutoModelForCausalLM.from_config(config, dtype=chosen, trust_remote_code=False)
            except Exception as error:  # whatever its class says about the values, one line says it
                raise InputError(f"makes no causal language model ({told(error)})", source=path) from error
    return model.to(device).eval()


def pretrained(folder: Path, config: Any, *, dtype: torch.dtype) -> PreTrainedModel:
    """Return a causal LM with the safetensors weights of a folder, on the host. InputError in one line."""
    try:
        return AutoModelForCausalLM.from_pretrained(
            folder, config=config, local_files_only=True, use_safetensors=True, trust_remote_code=False, dtype=dtype
        )
    except Exception as error:  # whatever is wrong with a user's weights, one line says it
        raise InputError(f"cannot be loaded ({told(error)})", source=folder) from error


def read_config(path: Path) -> tuple[Path, Any]:
    """Return (folder, transformers configuration) of a model folder or a config.json. InputError in one line."""
    folder = path if path.is_dir() else path.parent
    source = path / "config.json" if path.is_dir() else path
    if not source.is_file():
        raise InputError("no such file", source=source)
    return folder, read_config_file(source)


@dataclass(frozen=True, kw_only=True, eq=False)
class TextWindow:
    """ids: int64 [S]; documents: int32 [S], never falling, the same for tokens of one file, 0 for the first."""

    ids: Tensor
    documents: Tensor


def read_windows(
    texts: Sequence[Path], *, model_path: Path, tokenizer: str, seq_len_tokens: int, count: int, align_tokens: int = 1
) -> list[TextWindow]:
    """Return `count` consecutive windows of seq_len_tokens from the files, in the order given.

    tokenizer: "byte" takes every byte as a token id, "model" the model folder's own, "auto" the latter where it
    exists. align_tokens: every file begins at a multiple of it; what is left before the next one is filled with token 0
    and is a document of its own. Raises InputError when the text is too short, saying how long it is.
    """
    folder = model_path if model_path.is_dir() else model_path.parent
    data = [read_bytes(path, max_bytes=MAX_TEXT_BYTES) for path in texts]
    if tokenizer == "byte" or (tokenizer == "auto" and not _has_tokenizer(folder)):
        files = [_bytes_of(text + b"\n") for text in data[:-1]] + [_bytes_of(text) for text in data[-1:]]
    else:
        encode = read_tokenizer(folder).encode
        files = [torch.tensor(encode(text.decode(errors="replace")), dtype=torch.int64) for text in data]
    if align_tokens > 1:
        filled = [(file, file.new_zeros(-len(file) % align_tokens)) for file in files]
        files = [part for both in filled for part in both]
    ids = torch.cat(files)
    of_file = torch.repeat_interleave(torch.arange(len(files)), torch.tensor([len(file) for file in files])).int()
    needed = count * seq_len_tokens
    if ids.numel() < needed:
        problem = f"{ids.numel()} tokens in {len(texts)} files; {count} windows of {seq_len_tokens} need {needed}"
        raise InputError(problem, field="text")
    parts = zip(ids[:needed].split(seq_len_tokens), of_file[:needed].split(seq_len_tokens), strict=True)
    return [TextWindow(ids=part, documents=of_part - of_part[0]) for part, of_part in parts]


def _bytes_of(text: bytes) -> Tensor:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).long() if text else torch.zeros(0, dtype=torch.int64)


def read_tokenizer(folder: Path) -> Any:
    """Return the tokenizer of a local model folder; InputError when there is none."""
    if not _has_tokenizer(folder):  # else transformers would look for it elsewhere
        raise InputError("holds no tokenizer", source=folder, field="tokenizer")
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever is wrong with a user's tokenizer, one line says it
        raise InputError(f"cannot be loaded ({told(error)})", source=folder, field="tokenizer") from error


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in TOKENIZER_FILES)


def check_vocabulary(windows: Sequence[TextWindow], model: PreTrainedModel) -> None:
    """Raise InputError when a token id has no embedding in the model."""
    size = model.config.get_text_config().vocab_size
    highest = max(int(window.ids.max()) for window in windows)
    if highest >= size:
        raise InputError(f"token id {highest} is beyond the model's vocabulary of {size}", field="tokenizer")
