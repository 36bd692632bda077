"""LoRA by peft on sequences that are split over all ranks: every rank holds the frozen model and the small adapters.

    torchrun --nproc-per-node 8 examples/lora_peft.py --model path/to/model --plan plan.json --tokens tokens.npy

Losses and gradients of the ranks add up, so the adapters' gradients are summed by one all-reduce each, and nothing has
to be scaled. All ranks start with the same adapters (one seed) and take the same steps, so they stay the same.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import sparsering
from sparsering import Plan


def main() -> None:
    """Train adapters for some steps; write every step's loss and norm of gradients, and the adapters."""
    options = parse()
    mesh = sparsering.join()  # under torchrun: NCCL where there are GPUs, else gloo
    plan = sparsering.load_plan(options.plan)
    model = load_model(options.model, dtype=getattr(torch, plan.dtype))
    model.gradient_checkpointing_enable()
    torch.manual_seed(0)
    adapted = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")).to(mesh.device)
    sparsering.attach(adapted, plan, mesh)  # finds the transformers model inside of peft's
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=options.learning_rate)

    adapted.train()
    steps: list[dict[str, float]] = []
    for batch in batches(options, plan, vocabulary=model.config.vocab_size):
        part = sparsering.shard(batch, plan, mesh.rank)
        part = {name: tensor.to(mesh.device) for name, tensor in part.items()}
        loss = adapted(**part).loss  # the sum over this rank's tokens / the number of labels of all ranks
        loss.backward()
        for parameter in trained:
            dist.all_reduce(parameter.grad)
        norm = torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        total = loss.detach()
        dist.all_reduce(total)
        steps.append({"loss": total.item(), "grad_norm": norm.item()})
        if mesh.rank == 0:
            print(f"step {len(steps)}: {steps[-1]}", flush=True)

    if mesh.rank == 0:
        adapted.save_pretrained(options.out)
        (options.out / "steps.json").write_text(json.dumps(steps))
    sparsering.leave()


def batches(options: argparse.Namespace, plan: Plan, *, vocabulary: int) -> list[dict[str, Tensor]]:
    """Return one whole sequence per step, the same on every rank; labels are not shifted, -100 counts nothing."""
    if options.tokens is None:
        seeded = torch.Generator().manual_seed(0)
        ids = torch.randint(vocabulary, (options.steps, plan.seq_len_tokens), generator=seeded)
    else:
        ids = torch.from_numpy(np.load(options.tokens)).long()
    labels = ids if options.labels is None else torch.from_numpy(np.load(options.labels)).long()
    return [{"input_ids": ids[step][None], "labels": labels[step][None]} for step in range(options.steps)]


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
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--out", type=Path, default=Path("adapter"), help="folder for steps.json and the adapters")
    return parser.parse_args()


if __name__ == "__main__":
    main()
