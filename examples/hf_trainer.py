"""transformers' Trainer on sequences that are split over all ranks.

    torchrun --nproc-per-node 8 examples/hf_trainer.py --model path/to/model --plan plan.json --tokens tokens.npy

Two things differ from a Trainer that gives every rank other sequences: the data loader gives all ranks the same ones,
and the collator keeps this rank's shard of each. The loss needs nothing: the Trainer counts the labels of all ranks and
of all accumulated batches by itself (`average_tokens_across_devices`, its default), hands that count to the model, and
multiplies the loss by the number of ranks, because DDP averages gradients.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, Trainer, TrainingArguments

import sparsering
from sparsering import Mesh, Plan


class ShardCollator:
    """Makes a batch of whole sequences and keeps one rank's shard of it, with positions and globally shifted labels."""

    def __init__(self, plan: Plan, rank: int) -> None:
        """rank: this process's number among the plan's."""
        self.plan, self.rank = plan, rank

    def __call__(self, examples: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        """examples: token ids and labels, not shifted, of whole sequences of the plan's length."""
        ids, labels = (torch.stack(column) for column in zip(*examples, strict=True))
        return sparsering.shard({"input_ids": ids, "labels": labels}, self.plan, self.rank)


class ContextParallelTrainer(Trainer):
    """A Trainer whose ranks all see the same sequences in the same order. Evaluation would need the same loader."""

    def get_train_dataloader(self) -> DataLoader:
        """Shuffle by the run's seed alone; the Trainer's own loader would deal the sequences out to the ranks."""
        return DataLoader(
            self.train_dataset,  # pyright: ignore[reportArgumentType] # the Trainer leaves its type open
            batch_size=self.args.per_device_train_batch_size,
            shuffle=True,
            generator=torch.Generator().manual_seed(self.args.seed),
            collate_fn=self.data_collator,
        )


def main() -> None:
    """Join the other ranks, train, and leave."""
    options = parse()
    mesh = sparsering.join()  # under torchrun: NCCL where there are GPUs, else gloo; the Trainer uses what is there
    train(options, mesh)
    sparsering.leave()


def train(options: argparse.Namespace, mesh: Mesh) -> None:
    """Train for some steps; write what the Trainer logs of every step, and the trained model."""
    plan = sparsering.load_plan(options.plan)
    low = plan.dtype == "bfloat16"  # then autocast computes in it, and weights and optimizer stay float32
    model = load_model(options.model, dtype=torch.float32 if low else getattr(torch, plan.dtype))
    sparsering.attach(model, plan, mesh)
    model.gradient_checkpointing_enable()
    trainer = ContextParallelTrainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(options.out),
            max_steps=options.steps,
            per_device_train_batch_size=1,  # patterns are chosen for one sequence at a time
            gradient_accumulation_steps=options.accumulate,
            learning_rate=options.learning_rate,
            ddp_find_unused_parameters=False,
            bf16=low,
            use_cpu=mesh.device.type == "cpu",
            logging_steps=1,
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=sequences(options, plan, vocabulary=model.config.vocab_size),
        data_collator=ShardCollator(plan, mesh.rank),
    )
    trainer.train()
    trainer.save_model()
    if mesh.rank == 0:
        steps = [entry for entry in trainer.state.log_history if "loss" in entry]
        (options.out / "steps.json").write_text(json.dumps(steps))


def sequences(options: argparse.Namespace, plan: Plan, *, vocabulary: int) -> TensorDataset:
    """Return whole sequences, the same on every rank; labels are not shifted, -100 counts nothing."""
    if options.tokens is None:
        seeded = torch.Generator().manual_seed(0)
        ids = torch.randint(vocabulary, (options.steps * options.accumulate, plan.seq_len_tokens), generator=seeded)
    else:
        ids = torch.from_numpy(np.load(options.tokens)).long()
    labels = ids if options.labels is None else torch.from_numpy(np.load(options.labels)).long()
    return TensorDataset(ids, labels)


def load_model(path: Path, *, dtype: torch.dtype) -> PreTrainedModel:
    """Return the model of a folder, or one with seeded random weights of a config.json, in the plan's type."""
    if path.is_dir():
        return AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path), dtype=dtype)


def parse() -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of a causal LM, or a config.json")
    parser.add_argument("--plan", type=Path, required=True, help="what `sparsering plan` wrote, for these ranks")
    parser.add_argument("--tokens", type=Path, help="token ids [sequences, length] (.npy); default: random ones")
    parser.add_argument("--labels", type=Path, help="labels of the same shape (.npy); default: the tokens")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--accumulate", type=int, default=1, help="sequences per optimizer step")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--out", type=Path, default=Path("trained"), help="folder for steps.json and the model")
    return parser.parse_args()


if __name__ == "__main__":
    main()
