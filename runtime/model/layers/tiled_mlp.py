"""A decoder layer's MLP, computed in pieces of its tokens: its wide intermediate values are there for one piece only.

At a million tokens over eight ranks an 8B model's layer holds 9 GiB of them when it is computed again in backward, 15
without fused kernels. Gradients of weights are summed over pieces in at least float32 and rounded once, so
that they are as exact as without pieces. What it costs is one more forward pass of the MLP.

Shape legend: B batch, S tokens of this rank's shard, E hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import Module

from ....traces.errors import UnsupportedError

NAME = "mlp"  # of a decoder layer's part in transformers' models
PROBE_TOKENS, PROBE_PIECES = 6, 3


def require_tileable(layer: Module) -> None:
    """Refuse a layer without an MLP, or with one that looks at several tokens at once: UnsupportedError.

    Computes some random tokens whole and in pieces, without gradients.
    """
    module = getattr(layer, NAME, None)
    if not isinstance(module, Module):
        raise UnsupportedError(f"layers of {type(layer).__name__} have no part `{NAME}`", field="memory.mlp_tiles")
    weight = next(module.parameters(), None)
    if weight is None or weight.dim() != 2:
        raise UnsupportedError(f"`{NAME}` of {type(layer).__name__} holds no matrix", field="memory.mlp_tiles")
    generator = torch.Generator(weight.device).manual_seed(0)
    x = torch.randn(1, PROBE_TOKENS, _width(module), generator=generator, device=weight.device).to(weight.dtype)
    with torch.no_grad():
        whole = module(x)
        parts = [module(part) for part in x.chunk(PROBE_PIECES, dim=1)]
    if not isinstance(whole, Tensor) or whole.shape != x.shape:
        raise UnsupportedError(f"`{NAME}` of {type(layer).__name__} returns no values of its input's shape",
                               field="memory.mlp_tiles")  # fmt: skip
    error = (torch.cat(parts, dim=1) - whole).abs().max()
    if error > torch.finfo(weight.dtype).eps ** 0.5 * whole.abs().max():
        raise UnsupportedError(f"`{NAME}` of {type(layer).__name__} looks at several tokens at once",
                               field="memory.mlp_tiles")  # fmt: skip


def tile_mlp(layer: Module, tiles: int) -> None:
    """Make a layer compute its MLP in so many pieces of its tokens, forward and backward.

    The layer's other parts, its parameters and their names stay as they are. The MLP must not draw random numbers.
    """
    module: Any = getattr(layer, NAME)
    plain: Callable[[Tensor], Tensor] = module.forward
    within = _Within()

    def forward(x: Tensor) -> Tensor:
        if within.tile or tiles == 1:
            return plain(x)
        parameters = dict(module.named_parameters())
        return _Tiled.apply(module, within, tiles, tuple(parameters), x, *parameters.values())

    module.forward = forward


class _Within:
    """Whether the module is being called for one piece."""

    tile = False

    def __enter__(self) -> None:
        self.tile = True

    def __exit__(self, *_: object) -> None:
        self.tile = False


class _Tiled(torch.autograd.Function):
    """x [B, S, E] -> the module of x, piece by piece; parameters: of the module, in the order of their names."""

    @staticmethod
    def forward(
        ctx: Any, module: Module, within: _Within, tiles: int, names: tuple[str, ...], x: Tensor, *parameters: Tensor
    ) -> Tensor:
        """Compute all pieces without gradients, and keep the input alone."""
        ctx.save_for_backward(x, *parameters)
        ctx.module, ctx.within, ctx.tiles, ctx.names = module, within, tiles, names
        out = torch.empty_like(x)
        with within:
            for part, into in zip(x.chunk(tiles, dim=1), out.chunk(tiles, dim=1), strict=True):
                into.copy_(module(part.contiguous()))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        """Compute each piece again, with its gradients; weights' are summed over pieces in at least float32."""
        x, *parameters = ctx.saved_tensors
        (grad_out,) = grads
        wanted = ctx.needs_input_grad[5:]
        leaves = [one.detach().requires_grad_(need) for one, need in zip(parameters, wanted, strict=True)]
        trained = [leaf for leaf in leaves if leaf.requires_grad]
        sums = [torch.zeros_like(leaf, dtype=torch.promote_types(leaf.dtype, torch.float32)) for leaf in trained]
        grad_x = torch.empty_like(x)
        pieces = (one.chunk(ctx.tiles, dim=1) for one in (x, grad_out, grad_x))
        for part, grad_part, into in zip(*pieces, strict=True):
            piece = part.detach().contiguous().requires_grad_()
            with torch.enable_grad(), ctx.within:
                out = functional_call(ctx.module, dict(zip(ctx.names, leaves, strict=True)), (piece,))
            found = torch.autograd.grad(out, [piece, *trained], grad_part)
            into.copy_(found[0])
            for total, one in zip(sums, found[1:], strict=True):
                total += one
        summed = iter(sums)
        of_parameters = (next(summed).to(one.dtype) if need else None
                         for one, need in zip(parameters, wanted, strict=True))  # fmt: skip
        return None, None, None, None, grad_x, *of_parameters


def _width(module: Module) -> int:
    """The hidden size that a module takes: what its first matrix is multiplied with."""
    first: Any = next(one for one in module.modules() if getattr(one, "weight", None) is not None)
    size = getattr(first, "in_features", None)
    return int(size) if size is not None else int(first.weight.shape[0])  # transformers' Conv1D stores [in, out]
