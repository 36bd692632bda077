"""Writes what works with what into docs/support.md, from registries of backends and layouts. `make docs` runs it."""

from __future__ import annotations

from dataclasses import MISSING, fields
from pathlib import Path

from sparsering.kernels.flash4.backend import CAPABILITIES
from sparsering.kernels.select.registry import selectors
from sparsering.planner.layouts.layout import Layout
from sparsering.planner.layouts.registry import known_layouts
from sparsering.planner.schedule.backends import BACKENDS
from sparsering.planner.schedule.schedule import DIRECTIONS
from sparsering.planner.schedule.shape import AttentionShape
from sparsering.planner.specs import ELEMENT_BYTES

PAGE = Path(__file__).resolve().parent / "support.md"
BEGIN, END = "<!-- support: begin -->\n", "<!-- support: end -->\n"
OURS = ("triton", "flash4", "blockwise")
GPUS = {(8, 0): "A100", (9, 0): "H100, H200", (10, 0): "B200"}
# Query and K/V heads and head dim of models that people train, by whose shape they are.
SHAPES = {
    "Qwen2.5-3B": (16, 2, 128),
    "Qwen3-8B, Llama-3.1-8B": (32, 8, 128),
    "Llama-2-7B": (32, 32, 128),
    "SmolLM2-135M": (9, 3, 64),
    "Phi-3-mini": (32, 32, 96),
    "Gemma-3-1B": (4, 1, 256),
}
RANKS = (4, 8, 32)


def shipped() -> list[type[Layout]]:
    """Return the layouts that come along, the plainest first."""
    return [layout for layout in known_layouts() if layout.__module__.startswith("sparsering.")]


def runs_on(backend: str, capability: tuple[int, int]) -> bool:
    """Whether a backend's kernels are made for GPUs of this compute capability."""
    return capability in CAPABILITIES if backend == "flash4" else True


def gpu_rows() -> list[str]:
    """Return backend × GPU."""
    head = " | ".join(f"{name} ({major}.{minor})" for (major, minor), name in GPUS.items())
    lines = [f"| backend | {head} | CPU |", "|---|" + "---|" * (len(GPUS) + 1)]
    for backend in OURS:
        cells = ["yes" if runs_on(backend, capability) else "no" for capability in GPUS]
        lines.append(f"| `{backend}` | {' | '.join(cells)} | {'yes' if backend == 'blockwise' else 'no'} |")
    return lines


def shape_rows() -> list[str]:
    """Return model shape × backend × type, for mask blocks of 128 tokens."""
    columns = [(backend, dtype) for backend in OURS[:2] for dtype in ("bfloat16", "float32")]
    head = " | ".join(f"`{backend}`, {dtype}" for backend, dtype in columns)
    lines = [f"| shape of | heads : K/V heads, head dim | {head} |", "|---|---|" + "---|" * len(columns)]
    for name, (heads, kv_heads, head_dim) in SHAPES.items():
        cells = [taken(backend, head_dim, dtype) for backend, dtype in columns]
        lines.append(f"| {name} | {heads}:{kv_heads}, {head_dim} | {' | '.join(cells)} |")
    return lines


def taken(backend: str, head_dim: int, dtype: str) -> str:
    """Return whether a backend takes heads of this size and type, and how."""
    assert dtype in ELEMENT_BYTES
    facts = BACKENDS[backend]
    if facts.problem(head_dim=head_dim, dtype=dtype, block_size=128) is not None:
        return "no"
    computed = facts.kernel_head_dim(head_dim)
    return "yes" if computed == head_dim else f"padded to {computed}"


def values(layout: type[Layout], world_size: int) -> list[Layout]:
    """Return the layout with its defaults; what must be given is every divisor of the ranks but 1 and all of them."""
    needed = [field.name for field in fields(layout) if field.default is MISSING]
    if not needed:
        return [layout()]
    divisors = [size for size in range(2, world_size + 1) if world_size % size == 0]
    return [layout(**dict.fromkeys(needed, size)) for size in divisors]


def applies(layout: type[Layout], world_size: int, heads: int, kv_heads: int) -> bool:
    """Whether some value of the layout can be built for both directions of these sizes."""
    shape = AttentionShape(world_size=world_size, tokens_per_rank=1024, heads=heads, kv_heads=kv_heads, head_dim=64,
                           element_bytes=2, accumulator_bytes=4)  # fmt: skip
    for value in values(layout, world_size):
        if value.why_not(shape) is None and all(value.build(shape=shape, direction=one) for one in DIRECTIONS):
            return True
    return False


def layout_rows() -> list[str]:
    """Return layout × model shape × number of ranks."""
    shapes = sorted({(heads, kv_heads) for heads, kv_heads, _ in SHAPES.values()})
    head = " | ".join(f"{heads}:{kv_heads}" for heads, kv_heads in shapes)
    lines = [f"| layout | leaves out pairs without work | {head} |", "|---|---|" + "---|" * len(shapes)]
    for layout in shipped():
        cells = []
        for heads, kv_heads in shapes:
            able = [str(ranks) for ranks in RANKS if applies(layout, ranks, heads, kv_heads)]
            cells.append(", ".join(able) or "no")
        lines.append(f"| `{layout.name}` | {'yes' if layout.leaves_out else 'no'} | {' | '.join(cells)} |")
    return lines


def selector_rows() -> list[str]:
    """Return selector × what it may be used with."""
    ours = {name: kind for name, kind in selectors().items() if kind.__module__.startswith("sparsering.")}
    lines = ["| selector | early rows never see late tokens | packed documents |", "|---|---|---|"]
    for name, kind in ours.items():
        told = ["yes" if flag else "no" for flag in (kind.causal, kind.keeps_documents)]
        lines.append(f"| `{name}` | {told[0]} | {told[1]} |")
    return lines


def rendered() -> str:
    """Return what belongs between the marks of the page."""
    numbers = ", ".join(map(str, RANKS))
    parts = {
        "Backend × GPU": gpu_rows(),
        "Model × backend": shape_rows(),
        f"Layout × model: with how many of {numbers} ranks": layout_rows(),
        "Selectors": selector_rows(),
    }
    return "\n" + "\n".join("\n".join([f"## {title}", "", *lines, ""]) for title, lines in parts.items()) + "\n"


def main() -> None:
    """Replace what stands between the marks."""
    before, _, rest = PAGE.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(f"{before}{BEGIN}{rendered()}{END}{after}")


if __name__ == "__main__":
    main()
