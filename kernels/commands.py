"""The verb `doctor`: which backends work on this machine, tried on a small problem against the reference."""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from .api import backend_names, full_attention
from .mask import AttentionMask

TOKENS, HEADS, KV_HEADS, HEAD_DIM = 500, 4, 2, 64
BLOCK_SIZE = 128  # which every backend takes


def doctor(
    kernels: Annotated[
        bool, typer.Option("--kernels", help="Check every kind of problem on this GPU against float64.")
    ] = False,
    tune: Annotated[
        bool, typer.Option("--tune", help="With --kernels: time the launch settings too, and write the fastest.")
    ] = False,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Where --tune writes; `sparsering plan --launches` reads it.")
    ] = Path("launches.json"),
    backend: Annotated[str, typer.Option(help="With --kernels: triton or flash4.")] = "triton",
    seq_len_tokens: Annotated[int, typer.Option("--seq-len", help="Tokens to tune for.")] = 131072,
    density: Annotated[float, typer.Option(help="Share of active blocks to tune for.")] = 0.05,
    heads: Annotated[int, typer.Option(help="Query heads to tune for.")] = 16,
    kv_heads: Annotated[int, typer.Option(help="K/V heads to tune for.")] = 2,
    head_dim: Annotated[int, typer.Option(help="Head dim to tune for.")] = 128,
    block_size: Annotated[int, typer.Option(help="Mask block to tune for.")] = 128,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Show versions, devices, and for every kernel backend whether it agrees with the reference here.

    Each is tried forward and backward, with grouped queries, columns and a ragged tail; bfloat16 on a GPU, float32
    on a CPU. The figure is the largest error of out and gradients, relative to the largest value. With --kernels, one
    backend is checked on all shapes that the kernels promise: errors at most twice those of plain torch in the same
    data type. Exit code 1 when a backend gives wrong numbers.
    """
    if kernels:
        raise typer.Exit(_examine(backend, tune, output, as_json, {
            "seq_len_tokens": seq_len_tokens, "density": density, "heads": heads, "kv_heads": kv_heads,
            "head_dim": head_dim, "block_size": block_size,
        }))  # fmt: skip
    if tune:
        raise typer.BadParameter("needs --kernels", param_hint="--tune")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = {
        "versions": {
            name: _version(name) for name in ("sparsering", "torch", "triton", "transformers", "flash-attn-4")
        },
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] or ["cpu"],
        "backends": {name: _tried(name, device) for name in backend_names()},
    }
    typer.echo(json.dumps(found) if as_json else _page(found))
    if any(verdict["state"] == "wrong" for verdict in found["backends"].values()):
        raise typer.Exit(1)


def _examine(backend: str, tune: bool, output: Path, as_json: bool, shape: dict[str, Any]) -> int:
    """Check one backend's kernels, and tune them; the exit code."""
    if not torch.cuda.is_available():
        raise typer.BadParameter("needs an NVIDIA GPU", param_hint="--kernels")
    if backend not in ("triton", "flash4"):
        raise typer.BadParameter(f"{backend!r} is neither triton nor flash4", param_hint="--backend")
    if tune and backend != "triton":
        raise typer.BadParameter(f"{backend} has no launch settings of ours", param_hint="--tune")
    from .tools.doctor import check_kernels, tune_kernels

    found: dict[str, Any] = {"device": torch.cuda.get_device_name(), "backend": backend}
    say = (lambda line: None) if as_json else typer.echo
    found["cases"] = list(check_kernels(backend, say))
    wrong = [row["case"] for row in found["cases"] if row["state"] == "wrong"]
    if tune and not wrong:
        try:
            found |= tune_kernels(shape, output, say)
        except ValueError as error:
            raise typer.BadParameter(str(error), param_hint="--tune") from error
    if as_json:
        typer.echo(json.dumps(found))
    return 1 if wrong else 0


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _tried(backend: str, device: str) -> dict[str, Any]:
    """Return the state ("works", "wrong", "unavailable") of one backend, with its error or its reason."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    try:
        got = _outputs(backend, device, dtype)
    except Exception as error:  # a diagnosis reports whatever keeps a backend from running
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        return {"state": "unavailable", "reason": reason}
    expected = _outputs("reference", device, dtype)
    pairs = [(a.double(), b.double()) for a, b in zip(got, expected, strict=True)]
    largest = float(torch.stack([(a - b).abs().max() / b.abs().max() for a, b in pairs]).max())
    state = "works" if largest <= 8 * torch.finfo(dtype).eps else "wrong"  # also when it is NaN
    return {"state": state, "largest_error": largest, "dtype": str(dtype).removeprefix("torch.")}


def _outputs(backend: str, device: str, dtype: torch.dtype) -> list[torch.Tensor]:
    """Return out and the gradients of q, k, v for one seeded problem."""
    generator = torch.Generator().manual_seed(0)

    def draw(heads: int) -> torch.Tensor:
        return torch.randn(1, 512, heads, HEAD_DIM, generator=generator).to(device, dtype).requires_grad_()

    q, k, v = draw(HEADS), draw(KV_HEADS), draw(KV_HEADS)
    active = torch.zeros(HEADS, -(-TOKENS // BLOCK_SIZE), dtype=torch.bool)
    active[:, [0, 3]] = True
    columns = torch.tensor([1, 70, 200], dtype=torch.int32).repeat(HEADS, 1)
    mask = AttentionMask(seq_len_tokens=TOKENS, block_size=BLOCK_SIZE, active=active, columns=columns).to(device)
    out, _ = full_attention(q, k, v, mask, scale=HEAD_DIM**-0.5, backend=backend)
    out.sum().backward()
    gradients = [x.grad for x in (q, k, v) if x.grad is not None]
    return [out.detach(), *gradients]


def _page(found: dict[str, Any]) -> str:
    lines = [f"{name:<13}{version or 'not installed'}" for name, version in found["versions"].items()]
    lines += [f"{'device':<13}{name}" for name in found["devices"]]
    for name, verdict in found["backends"].items():
        detail = verdict.get("reason") or f"largest error {verdict['largest_error']:.1e} in {verdict['dtype']}"
        lines.append(f"{name:<13}{verdict['state']}: {detail}")
    return "\n".join(lines)
