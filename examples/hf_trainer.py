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

import torch
from shared import load_model, make_parser, same_on_every_rank, sequences
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from transformers import Trainer, TrainingArguments

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
        return same_on_every_rank(self, self.train_dataset)


def main() -> None:
    """Join the other ranks, train, and leave."""
    parser = make_parser(__doc__)
    parser.add_argument("--accumulate", type=int, default=1, help="sequences per optimizer step")
    options = parser.parse_args()
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
    count = options.steps * options.accumulate
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
        train_dataset=TensorDataset(*sequences(options, plan, count=count, vocabulary=model.config.vocab_size)),
        data_collator=ShardCollator(plan, mesh.rank),
    )
    trainer.train()
    trainer.save_model()
    if mesh.rank == 0:
        steps = [entry for entry in trainer.state.log_history if "loss" in entry]
        (options.out / "steps.json").write_text(json.dumps(steps))


if __name__ == "__main__":
    main()
