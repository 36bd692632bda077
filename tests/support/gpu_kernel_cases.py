"""Problems that the GPU backends promise to compute, on the GPU, and ways to compute them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sparsering.kernels import api
from sparsering.kernels.mask import AttentionMask, whole


@dataclass(frozen=True, kw_only=True)
class Case:
    """One problem; its name is its repr."""

    tokens: int = 1000
    padding: int = 24
    heads: tuple[int, int] = (16, 2)
    head_dim: int = 128
    block: int = 128
    toeplitz: bool = True
    columns: int = 0
    documents: bool = False
    dtype: torch.dtype = torch.bfloat16
    batch: int = 1
    windows: bool = False
    softcap: float | None = None
    sinks: bool = False

    def __str__(self) -> str:
        parts = [
            f"{self.tokens}+{self.padding}",
            f"{self.heads[0]}:{self.heads[1]}",
            f"d{self.head_dim}",
            f"b{self.block}",
            "toeplitz" if self.toeplitz else "csr",
            f"c{self.columns}",
            str(self.dtype).removeprefix("torch."),
        ]
        flags = [name for name in ("documents", "windows", "sinks") if getattr(self, name)]
        flags += [f"softcap{self.softcap}"] * (self.softcap is not None) + [f"batch{self.batch}"] * (self.batch > 1)
        return "-".join(parts + flags)

    def logits(self) -> torch.Tensor | None:
        """Learned sinks [H] on the GPU, None without."""
        return torch.linspace(-2, 2, self.heads[0], device="cuda") if self.sinks else None


CASES = [
    Case(),
    Case(head_dim=64, block=64, dtype=torch.float16),
    Case(head_dim=64, heads=(8, 8), toeplitz=False, columns=100),
    Case(heads=(32, 8), block=64, columns=200, tokens=2048, padding=0),
    Case(heads=(4, 4), batch=2, columns=64, dtype=torch.float16, tokens=777, padding=0),
    Case(documents=True, columns=70, heads=(8, 2)),
    Case(documents=True, toeplitz=False, block=64, heads=(8, 2), padding=300),
    Case(dtype=torch.float32, heads=(4, 2), columns=33),
    Case(tokens=130, padding=126, heads=(2, 1), columns=130),
    Case(head_dim=64, toeplitz=False, columns=50, dtype=torch.float16),
    Case(head_dim=64, heads=(4, 4), batch=2),
    Case(documents=True, toeplitz=False, heads=(8, 2), head_dim=64, batch=2),
    Case(tokens=90, padding=0, heads=(2, 2)),
    Case(windows=True),
    Case(windows=True, columns=200, heads=(8, 2), documents=True),
    Case(windows=True, columns=64, head_dim=64, block=64, toeplitz=False, dtype=torch.float16),
    Case(windows=True, columns=33, heads=(4, 2), dtype=torch.float32),
    Case(softcap=5.0, columns=100, heads=(8, 2)),
    Case(softcap=5.0, head_dim=64, block=64, dtype=torch.float16),
    Case(sinks=True, columns=100, heads=(8, 2), batch=2),
    Case(sinks=True, softcap=5.0, windows=True, heads=(8, 2)),
]


def promised(backend: str, case: Case) -> bool:
    """Whether the backend takes such a case; what it does not take must raise ValueError."""
    elements = case.windows or case.softcap is not None
    return backend != "flash4" or (case.block == 128 and case.dtype != torch.float32 and not elements)


def build(case: Case, seed: int = 0) -> tuple[list[torch.Tensor], AttentionMask]:
    """([grad_out, q, k, v], mask) on the GPU: random, head 0 without blocks, NaN in the padding."""
    generator = torch.Generator().manual_seed(seed)
    heads, kv_heads = case.heads
    blocks = -(-case.tokens // case.block)
    shape = (heads, blocks) if case.toeplitz else (heads, blocks, blocks)
    active = torch.rand(shape, generator=generator) < 0.4
    active[0] = False
    columns = documents = None
    if case.columns:
        columns = torch.stack(
            [torch.sort(torch.randperm(case.tokens, generator=generator)[: case.columns]).values for _ in range(heads)]
        ).int()
        columns[-1, case.columns // 2 :] = case.tokens
    if case.documents:
        documents = (torch.arange(case.tokens + case.padding) // 300).int()
    lengths = (1, 100, case.block, case.block + 1, 2 * case.block + 37, 300, 0, case.tokens)
    windows = tuple(lengths[head % len(lengths)] for head in range(heads)) if case.windows else None
    mask = AttentionMask(
        seq_len_tokens=case.tokens, block_size=case.block, active=active, columns=columns, documents=documents,
        windows=windows,
    )  # fmt: skip
    tensors = []
    for count in (heads, heads, kv_heads, kv_heads):
        x = torch.randn(case.batch, case.tokens + case.padding, count, case.head_dim, generator=generator)
        x[:, case.tokens :] = float("nan")
        tensors.append(x.to("cuda", case.dtype))
    return tensors, mask.to("cuda")


def run(
    tensors: list[torch.Tensor], mask: AttentionMask, scale: float, backend: str, *, softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> list[torch.Tensor]:  # fmt: skip
    """[out, lse, dq, dk, dv] of a backend, differentiated through full_attention."""
    grad_out = tensors[0]
    q, k, v = (x.detach().clone().requires_grad_() for x in tensors[1:])
    out, lse = api.full_attention(q, k, v, mask, scale=scale, backend=backend, softcap=softcap, sinks=sinks)
    return [out.detach(), lse, *torch.autograd.grad(out, (q, k, v), grad_out)]


def plain_torch(
    tensors: list[torch.Tensor], mask: AttentionMask, scale: float, *, softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> list[torch.Tensor]:  # fmt: skip
    """[out, dq, dk, dv] in the inputs' own dtype with torch's matmul and softmax: the error that rounding makes."""
    grad_out, q, k, v = (x.nan_to_num(0.0) for x in tensors)
    q, k, v = (x.detach().clone().requires_grad_() for x in (q, k, v))
    positions = torch.arange(q.shape[1], device=q.device)
    group = q.shape[2] // k.shape[2]
    keys, values = (x.repeat_interleave(group, 2).transpose(1, 2) for x in (k, v))
    allowed = torch.stack([whole(mask, head, positions, positions) for head in range(q.shape[2])])
    scores = (q.transpose(1, 2) @ keys.transpose(2, 3)) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill(~allowed, -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.to(scores.dtype)[None, :, None, None].expand(*scores.shape[:3], 1)], -1)
    weights = torch.softmax(scores, -1).nan_to_num(0.0).to(q.dtype)[..., : len(positions)]
    weights = torch.where(allowed, weights, 0.0)
    out = (weights @ values).transpose(1, 2)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), grad_out)]
