"""MTraining's own sparse rings (arXiv 2510.18830), measured by benchmarks/ring.py over the same masks as ours.

Their code (github.com/microsoft/MInference, branch wenxuan/mtrain) is no part of this package: --mtraining names a
folder that holds its package `minference`, of which dist_ops/{minfer_dr_striped,minfer_striped,utils}.py,
ops/{utils,pit_sparse_flash_attention_v3}.py and ops/op_utils/vertical_slash_utils.py are needed, beside empty
__init__.py files (theirs import all else). It is their Triton road, which needs GPUs.

Their call takes consecutive tokens of every rank, exchanges them so that rank r has the blocks r, r + W, … of 128
tokens, attends, and exchanges the result back; the index is built anew in every call. Measured both ways: the call as
it is (placement "contiguous") and without its exchanges, for tokens that lie in stripes already ("striped").
"""

from __future__ import annotations

import importlib
import io
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ...kernels.api import full_attention
from ...kernels.mask import AttentionMask
from ...planner.plan import ModelShape
from ...planner.schedule.placement import REGULAR_PLACEMENTS, Placement
from ...runtime.comm.mesh import Mesh
from ...traces.errors import InputError, UnsupportedError
from .masks import slash_mask
from .ring_timing import Figures, time_steps

FUNCTIONS = {
    "mtraining-hierarchical": ("minfer_dr_striped", "MInferDRStripeTritonFunc"),
    "mtraining-striped": ("minfer_striped", "MInferStripeTritonFunc"),
}
EXCHANGES = ("shuffle_striped_input", "recover_striped_output")
ERRORS = ("out_error", "dq_error", "dk_error", "dv_error")
BLOCK = 128  # their kernels split a causal block into two of 64 tokens
CHUNK = 128  # their index kernel reads slashes by so many, without looking where they end
CHECKED_TOKENS = 4096  # or the next length that they can do
LARGEST_ERROR = 2e-2  # of bfloat16 out and gradients, which they add up in bfloat16; of the norm of a shard


@dataclass(frozen=True, kw_only=True)
class PeerIndices:
    """What their functions take in place of counts, for all heads alike in width.

    columns: int32 [1, H, V] ascending, tokens' places in the striped order; from the first empty slot on seq_len_tokens
    slashes: int32 [1, H, S] distances query - key in tokens, descending, filled up with 0
    """

    columns: Tensor
    slashes: Tensor


def peer_indices(mask: AttentionMask, world_size: int) -> PeerIndices:
    """Return a mask's columns and slashes in their coordinates, on the mask's device.

    A slash at distance d * 128 touches the block diagonal d alone. Their index kernel never comes to the last slot of
    the columns, so one is left empty. Raises UnsupportedError for masks that they would compute otherwise.
    """
    _refuse(mask, world_size)
    block, seq_len, blocks = mask.block_size, mask.seq_len_tokens, mask.blocks
    distances = torch.arange(blocks, device=mask.active.device) * block
    slashes = torch.where(mask.active, distances, 0).sort(dim=1, descending=True).values
    width = -(-int(mask.active.sum(1).max()) // CHUNK) * CHUNK
    slashes = F.pad(slashes, (0, max(width - blocks, 0)))[:, :width]
    columns = torch.full((mask.heads, (mask.column_capacity // CHUNK + 1) * CHUNK), seq_len, device=mask.active.device)
    if mask.columns is not None:
        places = torch.from_numpy(_placement("striped", seq_len, world_size).permutation()).argsort().to(columns.device)
        places = F.pad(places, (0, 1), value=seq_len)  # an empty slot stays one
        columns[:, : mask.column_capacity] = places[mask.columns.long()].sort(dim=1).values
    return PeerIndices(columns=columns[None].int(), slashes=slashes[None].int())


def _refuse(mask: AttentionMask, world_size: int) -> None:
    unit = world_size * world_size * BLOCK
    if not mask.is_toeplitz or mask.documents is not None:
        raise UnsupportedError("MTraining knows slashes and columns only", field="mask")
    if mask.block_size != BLOCK:
        raise UnsupportedError(f"MTraining's blocks are {BLOCK} tokens, not {mask.block_size}", field="block_size")
    if mask.seq_len_tokens % unit:
        raise UnsupportedError(f"MTraining wants a multiple of {unit}, not {mask.seq_len_tokens}", field="seq_len")
    if not bool(mask.active[:, 0].all()):
        raise UnsupportedError("MTraining needs every head's own blocks", field="mask")


class MTraining:
    """One of their two rings on all ranks of a mesh. Making it is collective.

    inner_size: ranks of an inner ring (the hierarchical one has an outer ring of such rings). Raises InputError.
    """

    def __init__(self, name: str, folder: Path, mesh: Mesh, *, inner_size: int) -> None:
        module, function = FUNCTIONS[name]
        if inner_size < 1 or mesh.world_size % inner_size:
            raise InputError(f"{mesh.world_size} ranks are no rings of {inner_size}", field="inner_size")
        self.name, self.mesh = name, mesh
        self.layout = "ring"
        if str(folder.resolve()) not in sys.path:
            sys.path.insert(0, str(folder.resolve()))
        with redirect_stdout(io.StringIO()):  # it says that an extension is missing which this road does not use
            self._names = vars(importlib.import_module(f"minference.dist_ops.{module}"))
        self._function = self._names[function]
        self._group = mesh.new_group(range(mesh.world_size))
        if name == "mtraining-hierarchical":
            # Theirs read LOCAL_RANK and LOCAL_WORLD_SIZE, which say here which GPU is whose.
            first, place = mesh.rank // inner_size * inner_size, mesh.rank % inner_size
            inner, outer = range(first, first + inner_size), range(place, mesh.world_size, inner_size)
            self._names["get_inner_ring"] = lambda group: list(inner)
            self._names["get_outer_ring"] = lambda group: list(outer)
            self.layout = f"hierarchical:inner_size={inner_size}"

    @contextmanager
    def placed(self, placement: str) -> Iterator[None]:
        """Within: tokens lie so; nothing is exchanged before and after attention where they are "striped" already."""
        before = {name: self._names[name] for name in EXCHANGES}
        if placement == "striped":
            self._names.update(dict.fromkeys(EXCHANGES, lambda to_send, **_: to_send))
        try:
            yield
        finally:
            self._names.update(before)

    def attend(self, mask: AttentionMask) -> Callable[..., Tensor]:
        """Return out [1, S, H, D] of q [1, S, H, D], k and v [1, S, H_kv, D] over this mask, differentiable."""
        indices = peer_indices(mask.to(self.mesh.device), self.mesh.world_size)
        layer, scale, with_lse = 0, None, False
        given = (indices.columns, indices.slashes, layer, scale, BLOCK, with_lse, self._group)
        return lambda q, k, v: self._function.apply(q, k, v, *given)


def measure_peer(
    peer: MTraining, mask: AttentionMask, tensors: list[Tensor], repeats: int, before_bytes: int
) -> dict[tuple[str, str], Figures]:
    """Return the figures by placement of the tokens and what moves them and K/V. tensors: q, k, v, grad_out."""
    attend, figures = peer.attend(mask), {}
    for placement, transport in (("contiguous", "all_to_all+p2p"), ("striped", "p2p")):
        with peer.placed(placement):
            figures[placement, transport] = time_steps(attend, tensors, peer.mesh, repeats, before_bytes)
    return figures


def check_peer(peer: MTraining, model: ModelShape, *, seed: int) -> dict[str, float]:
    """Return the largest error of out and gradients, in either placement, of a short sequence against our definition.

    Relative to the norm of a rank's shard, on the worst rank. Raises InputError, on all ranks, if that is too large.
    """
    mesh, unit = peer.mesh, peer.mesh.world_size**2 * BLOCK
    seq_len = -(-CHECKED_TOKENS // unit) * unit
    mask = slash_mask(seq_len, 0.2, 64, heads=model.heads, block=BLOCK, seed=seed)
    tensors = _whole_sequence(model, seq_len, mesh, seed)
    given: dict[str, Any] = {"scale": model.head_dim**-0.5, "backend": "blockwise"}
    right = _step(
        lambda q, k, v: full_attention(q, k, v, mask.to(mesh.device), **given)[0],
        [tensor.float() for tensor in tensors],
    )
    attend, worst = peer.attend(mask), torch.zeros(len(ERRORS), device=mesh.device)
    for name in ("contiguous", "striped"):
        own = torch.from_numpy(_placement(name, seq_len, mesh.world_size).positions(mesh.rank)).to(mesh.device)
        with peer.placed(name):
            got = _step(attend, [tensor[:, own] for tensor in tensors])
        worst = torch.maximum(worst, torch.stack([_error(x, y[:, own]) for x, y in zip(got, right, strict=True)]))
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    errors: dict[str, float] = dict(zip(ERRORS, worst.tolist(), strict=True))
    if not all(error < LARGEST_ERROR for error in errors.values()):
        raise InputError(f"does not compute the same attention: {errors}", field=peer.name)
    return errors


def refusal(baselines: Sequence[str], families: Sequence[str], folder: Path | None, *, toy: bool) -> str | None:
    """Return in one line why these arguments of benchmarks/ring.py cannot measure MTraining's rings; None if they can.

    None, too, where none of the baselines is theirs.
    """
    if not FUNCTIONS.keys() & set(baselines):
        return None
    if toy:
        return "MTraining's rings need GPUs: not with --toy"
    if "slash" not in families:
        return "MTraining's rings need slash masks: --family slash"
    if folder is None:
        return "MTraining's rings need --mtraining, the folder of its package minference"
    paths = [folder / "minference" / "dist_ops" / f"{module}.py" for module, _ in FUNCTIONS.values()]
    absent = [path for path in paths if not path.is_file()]
    return f"--mtraining: {absent[0]} is missing" if absent else None


def _placement(name: str, seq_len: int, world_size: int) -> Placement:
    return REGULAR_PLACEMENTS[name](seq_len_tokens=seq_len, world_size=world_size, granularity_tokens=BLOCK)


def _whole_sequence(model: ModelShape, seq_len: int, mesh: Mesh, seed: int) -> list[Tensor]:
    """Return q, k, v and grad_out [1, seq_len, heads, D] in bfloat16 (float32 on CPUs), the same on every rank."""
    generator = torch.Generator().manual_seed(seed)
    dtype = torch.bfloat16 if mesh.device.type == "cuda" else torch.float32
    return [
        torch.randn(1, seq_len, heads, model.head_dim, generator=generator).to(mesh.device, dtype)
        for heads in (model.heads, model.kv_heads, model.kv_heads, model.heads)
    ]


def _step(attend: Callable[..., Tensor], tensors: list[Tensor]) -> list[Tensor]:
    """Return out, dq, dk and dv."""
    *inputs, grad_out = (tensor.detach().clone() for tensor in tensors)
    leaves = [tensor.requires_grad_() for tensor in inputs]
    out = attend(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad_out)]


def _error(got: Tensor, right: Tensor) -> Tensor:
    """Return |got - right| / |right|; infinite where got is no number: a maximum over ranks may not see that."""
    return ((got.double() - right.double()).norm() / right.double().norm()).float().nan_to_num(torch.inf)
