"""LoRA by peft on sequences that are split over all ranks: every rank holds the frozen model and the small adapters.

    torchrun --nproc-per-node 8 examples/lora_peft.py --model path/to/model --plan plan.json --tokens tokens.npy

Losses and gradients of the ranks add up, so the adapters' gradients are summed by one all-reduce each, and nothing has
to be scaled. All ranks start with the same adapters (one seed) and take the same steps, so they stay the same.
"""

from __future__ import annotations

import json

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from shared import batches, load_model, make_parser

import sparsering


def main() -> None:
    """Train adapters for some steps; write every step's loss and norm of gradients, and the adapters."""
    options = make_parser(__doc__, out="adapter").parse_args()
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


if __name__ == "__main__":
    main()
