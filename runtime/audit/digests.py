"""Digests of what an audit rests on: a model's class, settings and length, its sources, versions, and our own code."""

from __future__ import annotations

import hashlib
import inspect
import json
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from ...traces.files import canonical_json, sha256_of_bytes


def model_digest(config: Any, model_class: type[PreTrainedModel], seq_len_tokens: int) -> str:
    """Return the SHA-256 of what was audited: class, settings, and the length that windows are judged against."""
    name = f"{model_class.__module__}.{model_class.__qualname__}"
    document = {"class": name, "config": _plain_settings(config), "seq_len_tokens": seq_len_tokens}
    return sha256_of_bytes(canonical_json(document))


def audit_digest(config: Any, model_class: type[PreTrainedModel], seq_len_tokens: int) -> str:
    """Return the SHA-256 of all that an audit rests on: the model, the source of its class, versions, our own code."""
    document = {
        "model": model_digest(config, model_class, seq_len_tokens),
        "source": _source_digest(model_class),
        "versions": versions(),
        "audit": _own_digest(),
    }
    return sha256_of_bytes(canonical_json(document))


def _plain_settings(config: Any) -> Any:
    ignored = {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "_attn_implementation", "use_cache"}
    # As text, since canonical JSON has no infinity and some configurations do.
    return json.dumps({k: v for k, v in config.to_dict().items() if k not in ignored}, default=str, sort_keys=True)


def versions() -> dict[str, str]:
    """Return the versions that an audit rests on."""
    return {"torch": torch.__version__, "transformers": transformers.__version__, "python": sys.version.split()[0]}


@lru_cache(maxsize=1)
def _own_digest() -> str:
    folder = Path(__file__).parent
    return "".join(
        _file_digest(path) for path in sorted([*folder.glob("*.py"), *(folder.parent / "model").glob("*.py")])
    )


def _source_digest(model_class: type) -> str:
    """Return a digest of the files that define a class and its parents; "" for a class without a file."""
    files = set()
    for base in model_class.__mro__:
        try:
            files.add(inspect.getsourcefile(base))
        except (TypeError, OSError):
            continue
    return "".join(sorted(_file_digest(Path(name)) for name in files if name and Path(name).is_file()))


def _file_digest(path: Path) -> str:
    """Return a digest of a file's bytes, read again when its time or size changes."""
    state = path.stat()
    return _digest_of_state(path, state.st_mtime_ns, state.st_size)


@lru_cache(maxsize=4096)
def _digest_of_state(path: Path, mtime_ns: int, size_bytes: int) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
