"""TRL's SFTTrainer on sequences that are split over all ranks.

    torchrun --nproc-per-node 8 examples/trl_sft.py --model path/to/model --plan plan.json --data examples.jsonl

TRL prepares the data as always (here: lines with "prompt" and "completion", the loss on completions alone). Then all
ranks see the same examples, and the collator, after TRL's own has padded them at the end to the plan's length, keeps
this rank's shard of each. The loss needs nothing: SFTTrainer divides by the number of labels of all ranks
(`average_tokens_across_devices`, its default) and multiplies by the number of ranks, because DDP averages gradients.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from shared import make_parser, same_on_every_rank
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling, SFTTrainer

import sparsering
from sparsering import Mesh, Plan


class ShardCollator:
    """Pads examples to the plan's length and keeps one rank's shard, with positions and globally shifted labels."""

    def __init__(self, plan: Plan, rank: int, *, pad_token_id: int) -> None:
        """rank: this process's number among the plan's."""
        self.plan, self.rank = plan, rank
        self.pad = DataCollatorForLanguageModeling(pad_token_id, pad_to_multiple_of=plan.seq_len_tokens)

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Tensor]:
        """examples: as SFTTrainer prepares them, with "input_ids" and "labels" of at most the plan's length."""
        whole = self.pad(examples)
        del whole["attention_mask"]  # padding is at the end, where causal attention never looks, and has no labels
        return sparsering.shard(whole, self.plan, self.rank)


class ContextParallelSFTTrainer(SFTTrainer):
    """An SFTTrainer whose ranks all see the same examples in the same order. Evaluation would need the same loader."""

    def get_train_dataloader(self) -> DataLoader:
        """Shuffle by the run's seed alone; the Trainer's own loader would deal the examples out to the ranks."""
        return same_on_every_rank(self, self.train_dataset)


def main() -> None:
    """Join the other ranks, train, and leave."""
    parser = make_parser(__doc__, tokens=False)
    parser.add_argument("--data", type=Path, required=True, help='JSON lines of {"prompt": …, "completion": …}')
    options = parser.parse_args()
    mesh = sparsering.join()  # under torchrun: NCCL where there are GPUs, else gloo; the Trainer uses what is there
    train(options, mesh)
    sparsering.leave()


def train(options: argparse.Namespace, mesh: Mesh) -> None:
    """Train for some steps; write what the Trainer logs of every step, and the trained model."""
    plan = sparsering.load_plan(options.plan)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=getattr(torch, plan.dtype))
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    sparsering.attach(model, plan, mesh)
    trainer = ContextParallelSFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=str(options.out),
            max_steps=options.steps,
            max_length=plan.seq_len_tokens,  # longer examples are cut
            per_device_train_batch_size=1,  # patterns are chosen for one sequence at a time
            learning_rate=options.learning_rate,
            bf16=False,  # the whole model is in the plan's type; autocast would mix in others
            ddp_find_unused_parameters=False,
            use_cpu=mesh.device.type == "cpu",
            logging_steps=1,
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=Dataset.from_list([json.loads(line) for line in options.data.read_text().splitlines()]),
        data_collator=ShardCollator(plan, mesh.rank, pad_token_id=tokenizer.pad_token_id),
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model()
    if mesh.rank == 0:
        steps = [entry for entry in trainer.state.log_history if "loss" in entry]
        (options.out / "steps.json").write_text(json.dumps(steps))


if __name__ == "__main__":
    main()
