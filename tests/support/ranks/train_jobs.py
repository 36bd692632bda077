"""Jobs for tests/support/ranks/rank_pool.py that train: called as `function(mesh, **arguments)` on every rank."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch.distributed.tensor import DTensor

import flash4_contract
from sparsering.kernels.flash4 import launch as flash4_launch
from sparsering.planner.schedule.placement import zigzag
from sparsering.runtime.attention import planned as ring_attention
from sparsering.runtime.baselines.ring import ZigzagAttention
from sparsering.runtime.baselines.torch_ring import TorchContextParallel
from sparsering.runtime.comm.mesh import Mesh
from sparsering.runtime.model.shape import decoder_layers
from sparsering.runtime.train.config import parse_config
from sparsering.runtime.train.loop import Trainer
from sparsering.runtime.train.optimizer import TrainingError
from sparsering.runtime.train.patterns import Observed
from sparsering.runtime.train.setup import set_up


def run(mesh: Mesh, *, config: dict[str, Any], stop_before: int | None = None) -> dict[str, Any]:
    """Train, from a checkpoint where there is one; stop_before: leave, as if killed, before that step."""
    trainer = Trainer(set_up(parse_config(config)), mesh)
    first = trainer.resume()
    results = trainer.run(stop_before=stop_before)
    trainer.close()
    return {
        "first": first,
        "losses": [result.loss for result in results],
        "norms": [result.grad_norm for result in results],
        "valid": [result.valid_tokens for result in results],
        "parameters": parameters(trainer),
    }


def states(mesh: Mesh, *, config: dict[str, Any]) -> dict[str, Any]:
    """Train, and say of what types the parameters and the optimizer's tensors are."""
    trainer = Trainer(set_up(parse_config(config)), mesh)
    results = trainer.run()
    tensors = list(trainer.hf_model.parameters())
    tensors += [x for one in trainer.optimizer.state.values() for x in one.values() if torch.is_tensor(x)]
    trainer.close()
    types = sorted({str(tensor.dtype) for tensor in tensors})
    return {"losses": [result.loss for result in results], "types": types, "parameters": parameters(trainer)}


def counted(mesh: Mesh, *, config: dict[str, Any]) -> dict[str, Any]:
    """Do one step and count how often patterns were chosen and each direction of attention was played."""
    trainer = Trainer(set_up(parse_config(config)), mesh)
    assert trainer.masks is not None
    counts: dict[str, Any] = {"chosen": 0, "forward": 0, "backward": 0}
    source, play = trainer.masks.source, ring_attention.play

    def chosen(layer: int) -> Any:
        counts["chosen"] += 1
        return source(layer)

    def played(layer: Any, *arguments: Any) -> None:
        counts[layer.program.direction] += 1
        play(layer, *arguments)

    take_ms = trainer.exposure.take_ms

    def taken() -> float:
        counts["waits"] = len(trainer.exposure.waits)
        return take_ms()

    trainer.masks.source, ring_attention.play, trainer.exposure.take_ms = chosen, played, taken
    try:
        trainer.step(Observed(measured=True))
    finally:
        ring_attention.play = play
        trainer.close()
    return counts | {"parameters": parameters(trainer)}


def late_attention(mesh: Mesh, *, config: dict[str, Any], late_rank: int, late_s: float) -> tuple[dict[str, Any], int]:
    """Do two steps; in the second, which is measured, a rank is late for every layer. Return metrics and layers."""
    trainer = Trainer(set_up(parse_config(config)), mesh)
    trainer.step()
    layers = decoder_layers(trainer.hf_model)
    for layer in layers if mesh.rank == late_rank else ():
        block: Any = layer.self_attn
        block.register_forward_pre_hook(lambda *_: time.sleep(late_s))
    values = trainer.step(Observed(measured=True)).values()
    trainer.close()
    return values, len(layers)


def broken(mesh: Mesh, *, config: dict[str, Any], rank: int, layer: int, forward: bool) -> dict[str, Any]:
    """Make one rank's output of a layer, or its gradient, NaN in the second step; return what training said."""
    trainer = Trainer(set_up(parse_config(config)), mesh)
    trainer.step()
    before = parameters(trainer)
    if mesh.rank == rank:
        poison = torch.tensor(float("nan"))

        def hook(module: Any, inputs: Any, output: Any) -> Any:
            if forward:
                return output * poison
            output.register_hook(lambda gradient: gradient * poison)
            return output

        decoder_layers(trainer.hf_model)[layer].register_forward_hook(hook, prepend=True)
    try:
        trainer.step()
    except TrainingError as error:
        return {"error": str(error), "same": all((before[n] == p).all() for n, p in parameters(trainer).items())}
    finally:
        trainer.attached.detach()
    return {"error": "", "same": False}


def parameters(trainer: Trainer) -> dict[str, Any]:
    """Return the whole parameters as arrays."""
    named = trainer.hf_model.named_parameters()
    whole = {n: p.full_tensor() if isinstance(p, DTensor) else p for n, p in named}
    return {name: tensor.detach().cpu().numpy().copy() for name, tensor in whole.items()}


def dense_ring(mesh: Mesh, *, attention: str, seq_len_tokens: int, dtype: str, seed: int = 0) -> dict[str, list[float]]:
    """Run a dense baseline forward and backward; return per tensor [its error, that of plain torch in its type].

    "flash4-contract": the ring of "flash4" with flash4_contract.py in the place of the wheels. Errors are the largest
    over this rank's rows, against float64.
    """
    kind, device = getattr(torch, dtype), mesh.device
    generator = torch.Generator(device).manual_seed(seed)
    shapes = [(1, seq_len_tokens, heads, 64) for heads in (4, 2, 2, 4)]
    whole = [torch.randn(shape, generator=generator, device=device).to(kind) for shape in shapes]
    placement = zigzag(
        seq_len_tokens=seq_len_tokens, world_size=mesh.world_size,
        granularity_tokens=seq_len_tokens // (2 * mesh.world_size),
    )  # fmt: skip
    own = torch.from_numpy(placement.positions(mesh.rank)).to(device)
    if attention == "torch":
        ring = TorchContextParallel(mesh)
    elif attention == "flash4-contract":
        ring = ZigzagAttention(mesh)
        ring.kernel = "flash4"
    else:
        ring = ZigzagAttention(mesh, kernel=attention)
    wanted = _plainly(*(x.double() for x in whole))
    plain = _plainly(*whole)
    q, k, v = (x[:, own].contiguous().requires_grad_() for x in whole[:3])
    wheels = flash4_launch.wheels
    if attention == "flash4-contract":
        flash4_launch.wheels = lambda: (flash4_contract, None)
    try:
        out = ring(q, k, v)
        out.backward(whole[3][:, own])
    finally:
        flash4_launch.wheels = wheels
    errors: dict[str, list[float]] = {}
    results = zip(("out", "dq", "dk", "dv"), (out, q.grad, k.grad, v.grad), wanted, plain, strict=True)
    for name, got, exact, rounded in results:
        assert got is not None
        errors[name] = [(x.double() - exact[:, own]).abs().max().item() for x in (got, rounded[:, own])]
    return errors


def _plainly(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, grad_out: torch.Tensor) -> list[torch.Tensor]:
    """Return out, dq, dk, dv of dense causal attention, written out."""
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    group = q.shape[2] // k.shape[2]
    query, key, value = (
        x.repeat_interleave(repeat, dim=2).transpose(1, 2) for x, repeat in zip(leaves, (1, group, group), strict=True)
    )
    causal = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool, device=q.device).tril()
    scores = (query @ key.transpose(2, 3) * q.shape[3] ** -0.5).masked_fill(~causal, -torch.inf)
    out = (scores.softmax(-1) @ value).transpose(1, 2)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad_out)]


def observed_choices(mesh: Mesh, *, config: dict[str, Any]) -> dict[str, Any]:
    """Train; say of every step how often patterns were chosen and how long, their hash, and the first microbatch's."""
    trainer = Trainer(set_up(parse_config(config)), mesh)
    masks = trainer.masks
    assert masks is not None
    source, take_hash, results = masks.source, masks.take_hash, []
    chosen: list[int] = []
    hashes: list[int] = []

    def counting(layer: int) -> Any:
        chosen[-1] += 1
        return source(layer)

    def noted() -> torch.Tensor:
        taken = take_hash()
        hashes.append(int(taken))
        return taken

    masks.source, masks.take_hash = counting, noted
    firsts = []
    for _ in range(trainer.config.steps):
        chosen.append(0)
        results.append(trainer.step(Observed(measured=True, weighed=True, recorded=True)))
        records = masks.take_records()
        heads = [(head, pattern.num_blocks) for pattern, _ in records.values() for head in pattern.heads]
        firsts.append([(head.columns.tolist(), head.block_bits(blocks).tolist()) for head, blocks in heads])
    trainer.close()
    return {
        "chosen": chosen, "hashes": hashes, "firsts": firsts,
        "choosing_ms": [result.parts_ms["choosing"] for result in results],
        "values": [result.values() for result in results], "parameters": parameters(trainer),
    }  # fmt: skip
