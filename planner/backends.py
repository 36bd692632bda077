"""What each kernel backend takes: head dims, mask blocks, types; a test holds it equal to the kernels' own tables.

What no GPU kernel takes is refused when a plan is made or read, not by the GPU that it is run on.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..traces.errors import InputError, UnsupportedError

FASTEST = "fastest"


@dataclass(frozen=True, kw_only=True)
class Taken:
    """What one backend takes; None: any.

    head_dims: those that its kernels have, ascending. padded_step: other head dims that are multiples of it, below the
    largest, are computed as the next one with zeros behind them (kernels/triton/padded.py); None: no others are taken.
    """

    head_dims: tuple[int, ...] | None = None
    padded_step: int | None = None
    block_sizes: tuple[int, ...] | None = None
    dtypes: tuple[str, ...] | None = None

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


TAKEN: dict[str, Taken] = {
    "reference": Taken(),
    "blockwise": Taken(),
    "triton": Taken(head_dims=(16, 32, 64, 128), padded_step=8, block_sizes=(16, 32, 64, 128)),
    "flash4": Taken(head_dims=(64, 128), block_sizes=(128,), dtypes=("float16", "bfloat16")),
}
# What "fastest" becomes on a GPU: the first that takes the attention. Without a GPU it is blockwise, which takes any,
# but a plan is not known to stay there.
ON_GPUS = ("flash4", "triton")


def computed_head_dim(backend: str, *, head_dim: int, dtype: str, block_size: int) -> int:
    """Return what a backend's kernels compute heads of `head_dim` as: the same, or the size that they are padded to.

    Raises UnsupportedError, in one line that names the field, its value and what is taken, where they do not take it;
    InputError for a backend that there is not.
    """
    if backend not in (*TAKEN, FASTEST):
        raise InputError(f"{backend!r} is not one of {', '.join((*TAKEN, FASTEST))}", field="backend")
    problems = [TAKEN[name].problem(head_dim=head_dim, dtype=dtype, block_size=block_size) for name in _meant(backend)]
    if None in problems:
        return kernel_head_dim(backend, head_dim)
    assert problems[-1] is not None
    field, value, taken = problems[-1]
    raise UnsupportedError(
        f"{value} is not what {' or '.join(_meant(backend))} kernels take: {taken}; blockwise, plain torch, takes any",
        field=field,
    )


def kernel_head_dim(backend: str, head_dim: int) -> int:
    """Return the same by head dim alone; what is not taken, as it is: for prices and sizes of what is never run."""
    found = (TAKEN[name].kernel_head_dim(head_dim) for name in _meant(backend))
    return next((dim for dim in found if dim is not None), head_dim)


def _meant(backend: str) -> tuple[str, ...]:
    return ON_GPUS if backend == FASTEST else (backend,)


def _listed(values: tuple[object, ...]) -> str:
    return ", ".join(map(str, values))
