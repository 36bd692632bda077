"""What the example scripts have in common: their options, the model, the sequences, and a loader for trainers."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, Trainer

from sparsering import Plan


def make_parser(description: str | None, *, out: str = "trained", tokens: bool = True) -> argparse.ArgumentParser:
    """Return a parser of the options that all scripts have. tokens: of the files with token ids and labels, too."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model",
        type=Path,
        required=True,
        help="folder of a causal LM; where no tokenizer is needed, or a config.json",
    )
    parser.add_argument("--plan", type=Path, required=True, help="what `sparsering plan` wrote, for these ranks")
    if tokens:
        parser.add_argument("--tokens", type=Path, help="token ids [sequences, length] (.npy); default: random ones")
        parser.add_argument("--labels", type=Path, help="labels of the same shape (.npy); default: the tokens")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--out", type=Path, default=Path(out), help="folder for steps.json and what was trained")
    return parser


def load_model(path: Path, *, dtype: torch.dtype) -> PreTrainedModel:
    """Return the model of a folder, or one with seeded random weights of a config.json."""
    if path.is_dir():
        return AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path), dtype=dtype)


def sequences(options: argparse.Namespace, plan: Plan, *, count: int, vocabulary: int) -> tuple[Tensor, Tensor]:
    """Return token ids and labels [count, S], the same on every rank; labels are not shifted, -100 counts nothing."""
    if options.tokens is None:
        ids = torch.randint(vocabulary, (count, plan.seq_len_tokens), generator=torch.Generator().manual_seed(0))
    else:
        ids = torch.from_numpy(np.load(options.tokens)).long()
    labels = ids if options.labels is None else torch.from_numpy(np.load(options.labels)).long()
    return ids, labels


def batches(options: argparse.Namespace, plan: Plan, *, vocabulary: int) -> list[dict[str, Tensor]]:
    """Return one whole sequence per step."""
    ids, labels = sequences(options, plan, count=options.steps, vocabulary=vocabulary)
    return [{"input_ids": ids[step][None], "labels": labels[step][None]} for step in range(options.steps)]


def same_on_every_rank(trainer: Trainer, dataset: Any) -> DataLoader:
    """Return a loader by which all ranks see the same sequences in the same order, shuffled by the run's seed alone."""
    return DataLoader(
        dataset,
        batch_size=trainer.args.per_device_train_batch_size,
        shuffle=True,
        generator=torch.Generator().manual_seed(trainer.args.seed),
        collate_fn=trainer.data_collator,
    )
