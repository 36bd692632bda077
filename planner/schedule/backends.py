"""The one table of what plans must know of each kernel backend: how it launches, and what it takes.

What no GPU kernel takes is refused when a plan is made or read, not by the GPU that it is run on. Planning imports no
kernels, so a test holds the table equal to them. A backend of one's own (kernels/backend.py) is planned with after
`register_backend`.
"""

from __future__ import annotations

from dataclasses import dataclass

from ...traces.errors import UnsupportedError, unknown_name

FASTEST = "fastest"


@dataclass(frozen=True, kw_only=True)
class BackendFacts:
    """How one backend launches, and what it takes; the defaults are those of kernels in plain torch.

    joins_keys: key shards that lie one after the other are one to it. fuses_columns: it attends columns in the launch
    of keys. rounds_gradients: it writes a launch's dK and dV in the type of q, k and v. whole_blocks: shards must hold
    whole mask blocks. needs_gpu: it runs on GPUs alone.
    What it takes, None for any. head_dims: those that its kernels have, ascending. padded_step: other head dims that
    are multiples of it, below the largest, are computed as the next one with zeros behind them
    (kernels/triton/padded.py); None: no others are taken. elements: sliding windows that are exact to the token, and
    softcaps; without them it knows whole blocks and plain scores alone.
    """

    joins_keys: bool = False
    fuses_columns: bool = False
    rounds_gradients: bool = False
    whole_blocks: bool = False
    needs_gpu: bool = False
    head_dims: tuple[int, ...] | None = None
    padded_step: int | None = None
    block_sizes: tuple[int, ...] | None = None
    dtypes: tuple[str, ...] | None = None
    elements: bool = True

    def kernel_head_dim(self, head_dim: int) -> int | None:
        """Return what the kernels compute heads of this size as; None where they do not."""
        if self.head_dims is None or head_dim in self.head_dims:
            return head_dim
        if self.padded_step is None or head_dim % self.padded_step:
            return None
        return next((have for have in self.head_dims if have > head_dim), None)

    def problem(self, *, head_dim: int, dtype: str, block_size: int) -> tuple[str, object, str] | None:
        """Return (field, value, what is taken instead) of the first that is not taken."""
        if self.kernel_head_dim(head_dim) is None and self.head_dims is not None:
            others = f", or with padding other multiples of {self.padded_step} below {self.head_dims[-1]}"
            return "head_dim", head_dim, _listed(self.head_dims) + (others if self.padded_step else "")
        for field, value, known in (("block_size", block_size, self.block_sizes), ("dtype", dtype, self.dtypes)):
            if known is not None and value not in known:
                return field, value, _listed(known)
        return None


BACKENDS: dict[str, BackendFacts] = {
    "reference": BackendFacts(),
    "blockwise": BackendFacts(),
    "triton": BackendFacts(
        joins_keys=True,
        fuses_columns=True,
        whole_blocks=True,
        needs_gpu=True,
        head_dims=(16, 32, 64, 128, 256, 512),
        padded_step=8,
        block_sizes=(16, 32, 64, 128),
    ),
    "flash4": BackendFacts(
        joins_keys=True,
        rounds_gradients=True,
        whole_blocks=True,
        needs_gpu=True,
        head_dims=(64, 128),
        block_sizes=(128,),
        dtypes=("float16", "bfloat16"),
        elements=False,
    ),
}
# What "fastest" becomes on a GPU: the first that takes the attention. Without a GPU it is blockwise, which takes any,
# but a plan is not known to stay there.
ON_GPUS = ("flash4", "triton")
FASTEST_FACTS = BackendFacts(whole_blocks=True)


def register_backend(name: str, facts: BackendFacts) -> None:
    """Make a backend known to plans. Raises ValueError when the name has other facts."""
    if BACKENDS.setdefault(name, facts) != facts:
        raise ValueError(f"backend: {name!r} is known already, as {BACKENDS[name]}")


def known_backends() -> tuple[str, ...]:
    """Return the names that a plan may say, "fastest" last."""
    return *BACKENDS, FASTEST


def facts_of(backend: str) -> BackendFacts:
    """Return the facts of a backend, or what is planned with before "fastest" became one. InputError for others."""
    if backend == FASTEST:
        return FASTEST_FACTS
    if backend not in BACKENDS:
        raise unknown_name(backend, known_backends(), field="backend")
    return BACKENDS[backend]


def computed_head_dim(backend: str, *, head_dim: int, dtype: str, block_size: int) -> int:
    """Return what a backend's kernels compute heads of `head_dim` as: the same, or the size that they are padded to.

    Raises UnsupportedError, in one line that names the field, its value and what is taken, where they do not take it;
    InputError for a backend that there is not.
    """
    facts_of(backend)
    meant = [BACKENDS[name] for name in _meant(backend)]
    problems = [facts.problem(head_dim=head_dim, dtype=dtype, block_size=block_size) for facts in meant]
    if None in problems:
        return kernel_head_dim(backend, head_dim)
    assert problems[-1] is not None
    field, value, taken = problems[-1]
    raise UnsupportedError(
        f"{value} is not what {' or '.join(_meant(backend))} kernels take: {taken}; blockwise, plain torch, takes any",
        field=field,
    )


def require_elements(backend: str, *, field: str, value: object) -> None:
    """Refuse a backend that knows whole blocks and plain scores alone, where a window or a softcap asks for more.

    field, value: what asks, which UnsupportedError names. "fastest" becomes one that takes it where the plan runs.
    """
    facts_of(backend)
    takes = [name for name, facts in BACKENDS.items() if facts.elements]
    if not any(name in takes for name in _meant(backend)):
        told = f"{value} is not what {backend} kernels take: they know whole blocks and plain scores alone"
        raise UnsupportedError(f"{told}; {', '.join(takes)} take windows and softcaps", field=field)


def kernel_head_dim(backend: str, head_dim: int) -> int:
    """Return the same by head dim alone; what is not taken, as it is: for prices and sizes of what is never run."""
    found = (BACKENDS[name].kernel_head_dim(head_dim) for name in _meant(backend))
    return next((dim for dim in found if dim is not None), head_dim)


def _meant(backend: str) -> tuple[str, ...]:
    return ON_GPUS if backend == FASTEST else (backend,)


def _listed(values: tuple[object, ...]) -> str:
    return ", ".join(map(str, values))
