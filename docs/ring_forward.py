"""The forward of ring attention by hand: queries stay, keys and values travel around. Equals causal attention.

torchrun --nproc-per-node 2 docs/ring_forward.py

q, k, v and out are [heads, tokens, head_dim] of one rank, lse is [heads, tokens], positions are those in the sequence.
"""

import torch
import torch.distributed as dist
from torch import Tensor


def partial(q: Tensor, k: Tensor, v: Tensor, q_at: Tensor, k_at: Tensor) -> tuple[Tensor, Tensor]:
    """Attend some of the keys: out, and the log-sum-exp of the scores (0 and -inf in rows that attend none)."""
    scores = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(k_at > q_at[:, None], -torch.inf)
    lse = scores.logsumexp(-1)
    return (scores - lse[..., None]).exp().nan_to_num() @ v, lse


def merge(out: Tensor, lse: Tensor, more_out: Tensor, more_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Join attention over disjoint keys: each part weighs exp(its lse - lse of both)."""
    both = torch.logaddexp(lse, more_lse)
    return out * (lse - both).exp()[..., None] + more_out * (more_lse - both).exp()[..., None], both


def ring_forward(q: Tensor, k: Tensor, v: Tensor, positions: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Attend all shards: phase p computes the keys of rank - p while those of the next phase are on their way."""
    rank, world = dist.get_rank(), dist.get_world_size()
    kv, out, lse = torch.stack([k, v]), q, q[..., 0]  # out and lse are set in phase 0
    for phase in range(world):
        coming, transfers = torch.empty_like(kv), []
        if phase < world - 1:
            pass_on = dist.P2POp(dist.isend, kv, (rank + 1) % world)
            receive = dist.P2POp(dist.irecv, coming, (rank - 1) % world)
            transfers = dist.batch_isend_irecv([pass_on, receive])
        part = partial(q, kv[0], kv[1], positions[rank], positions[(rank - phase) % world])
        out, lse = part if phase == 0 else merge(out, lse, *part)
        for transfer in transfers:
            transfer.wait()
        kv = coming
    return out, lse


def main() -> None:
    """Deal tokens to ranks in stripes of 16, play the ring, and hold it to the attention of one device."""
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    q, k, v = torch.randn(3, 4, world * 64, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    positions = [torch.arange(world * 64).view(-1, world, 16)[:, owner].flatten() for owner in range(world)]
    own = positions[rank]
    out, _ = ring_forward(q[:, own], k[:, own], v[:, own], positions)
    torch.testing.assert_close(out, torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)[:, own])
    print(f"rank {rank} of {world}: equal")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
