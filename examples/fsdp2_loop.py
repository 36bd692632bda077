"""A plain PyTorch training loop with FSDP2: sequences are split over all ranks, and so are the parameters.

    torchrun --nproc-per-node 8 examples/fsdp2_loop.py --model path/to/model --plan plan.json --tokens tokens.npy

Every rank reads the same sequences and keeps its own shard of each; the ranks meet in attention, which follows the
plan, and in FSDP's collectives. The plan fixes how many ranks there are, how long a sequence is, and in which type
attention computes.
"""

from __future__ import annotations

import json

import torch
import torch.distributed as dist
from shared import batches, load_model, make_parser
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

import sparsering
from sparsering import Plan


def main() -> None:
    """Train for some steps; write every step's loss and norm of gradients, and the trained model."""
    options = make_parser(__doc__).parse_args()
    mesh = sparsering.join()  # under torchrun: NCCL where there are GPUs, else gloo
    plan = sparsering.load_plan(options.plan)
    model = load_model(options.model, dtype=torch.float32)
    sparsering.attach(model, plan, mesh)  # before FSDP hides the parameters; collective, as all that follows
    model.gradient_checkpointing_enable()
    shard_parameters(model, plan, device_type=mesh.device.type, world_size=mesh.world_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate)

    model.train()
    steps: list[dict[str, float]] = []
    for batch in batches(options, plan, vocabulary=model.config.vocab_size):
        part = sparsering.shard(batch, plan, mesh.rank)
        part = {name: tensor.to(mesh.device) for name, tensor in part.items()}
        loss = model(**part).loss  # the sum over this rank's tokens / the number of labels of all ranks
        (loss * mesh.world_size).backward()  # FSDP averages gradients over ranks; these add up
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        total = loss.detach()
        dist.all_reduce(total)  # adds up, too: now the mean over all labels
        assert isinstance(norm, DTensor)  # spread over the ranks, as the gradients are
        steps.append({"loss": total.item(), "grad_norm": norm.full_tensor().item()})
        if mesh.rank == 0:
            print(f"step {len(steps)}: {steps[-1]}", flush=True)

    whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if mesh.rank == 0:
        model.save_pretrained(options.out, state_dict=whole)
        (options.out / "steps.json").write_text(json.dumps(steps))
    sparsering.leave()


def shard_parameters(model: PreTrainedModel, plan: Plan, *, device_type: str, world_size: int) -> None:
    """Spread parameters, gradients and optimizer states, in float32, over all ranks; compute in the plan's type."""
    ranks = init_device_mesh(device_type, (world_size,))
    policy = MixedPrecisionPolicy(param_dtype=getattr(torch, plan.dtype), reduce_dtype=torch.float32)
    for layer in model.base_model.get_submodule("layers").children():
        fully_shard(layer, mesh=ranks, mp_policy=policy)
    fully_shard(model, mesh=ranks, mp_policy=policy)


if __name__ == "__main__":
    main()
