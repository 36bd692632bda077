"""From a checkpoint to a model folder that transformers loads: verified, put together on the host, renamed."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.state_dict_loader import load
from transformers import AutoModelForCausalLM

from ...traces.dataset.whole_folder import require_empty, whole_folder
from ...traces.errors import InputError
from .checkpoint import newest_checkpoint, verify_checkpoint
from .config import TrainConfig
from .model import master_dtype, read_model_config

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt",
    "added_tokens.json", "chat_template.jinja",
)  # fmt: skip


def export_checkpoint(config: TrainConfig, output: Path) -> dict[str, Any]:
    """Write the newest checkpoint's model as config.json and safetensors; one process, no GPU.

    Weights have the run's type (bfloat16, …); the tokenizer's files are copied along. Raises InputError when there is
    no checkpoint, when a file of it was altered, or when `output` holds something.
    """
    if config.checkpoint is None:
        raise InputError("the run writes no checkpoint", field="checkpoint")
    found = newest_checkpoint(config.checkpoint.folder)
    if found is None:
        raise InputError("holds no complete checkpoint", source=config.checkpoint.folder)
    require_empty(output)
    manifest = verify_checkpoint(found)
    model_config = read_model_config(config.model)
    model = AutoModelForCausalLM.from_config(model_config, dtype=master_dtype(config), trust_remote_code=False)
    state = {"model": model.state_dict()}
    load(state, checkpoint_id=found, no_dist=True)
    model.load_state_dict(state["model"])
    model.to(getattr(torch, config.dtype))
    with whole_folder(output) as working:
        model.save_pretrained(working)
        for name in TOKENIZER_FILES:
            if (config.model.folder / name).is_file():
                shutil.copyfile(config.model.folder / name, working / name)
    return {"step": manifest["step"], "folder": str(output)}
