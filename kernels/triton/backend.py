"""The Triton backend: checks and launches. Contracts are those of api.py and of Backend.

The column part is fused behind the block part of the same launch. Heads of sizes that the kernels lack (head_dims.py)
are computed as the next larger ones (padded.py). Gradients are bitwise repeatable: every element of an accumulator has
one owner and one order.
On a CPU the kernels run in Triton's interpreter, if TRITON_INTERPRET=1 was set before triton was imported.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from ..backend import Backend, register
from ..head_dims import kernel_head_dim
from ..index.block import block_task
from ..index.columns import ColumnTask, column_task
from ..mask import AttentionMask
from ..values import BackwardQueries, ColumnIndex, Columns, Gradients, KeyGradients, Keys, Partial, Queries, with_kv
from . import launching, padded, passes
from .gradients import grad_columns, grad_key_value, grad_query, row_values_of
from .launching import loadable
from .partials import check_partial, key_gradients, query_gradient, write_partial
from .sinks import launch_with_sinks


class Triton(Backend):
    """Our kernels, on GPUs of compute capability 8.0 and later; mask blocks of 16 to 128 tokens."""

    name = "triton"

    def block_index(self, mask: AttentionMask, q_positions: Tensor, k_positions: Tensor) -> Any:
        """See Backend. Raises ValueError for block sizes other than 16 to 128 and for tiles that split a block."""
        launching.check_block_size(mask)
        return block_task(mask, q_positions, k_positions)

    def column_index(self, mask: AttentionMask, q_positions: Tensor) -> ColumnTask:
        """See Backend. Raises ValueError as block_index does, and for a mask without columns."""
        launching.check_block_size(mask)
        return column_task(mask, q_positions)

    def forward(
        self, queries: Queries, keys: Keys | None, columns: Columns | None, *, earlier: Partial | None, final: bool
    ) -> Partial:
        """See Backend. `earlier` is merged in place where it has the dtype wanted."""
        if earlier is not None:
            check_partial(*earlier, queries.q)
        if kernel_head_dim(queries.q.shape[3]) != queries.q.shape[3]:
            return padded.forward(self.forward, queries, keys, columns, earlier=earlier, final=final)
        launching.check_parts(queries, keys, columns)
        queries = replace(queries, q=loadable(queries.q))
        keys, columns = with_kv(keys, loadable), with_kv(columns, loadable)
        return write_partial(queries, keys, columns, earlier, queries.q.dtype if final else None)

    def backward(self, queries: BackwardQueries, keys: Keys | None, columns: Columns | None, into: Gradients) -> None:
        """See Backend."""
        if kernel_head_dim(queries.q.shape[3]) != queries.q.shape[3]:
            padded.backward(self.backward, queries, keys, columns, into)
            return
        launching.check_parts(queries, keys, columns)
        keys, columns = _with_work(keys, columns, into)
        if keys is None and columns is None:
            into.query.finish_rows(0)
            return
        q, grad_out = loadable(queries.q), loadable(queries.grad_out.to(queries.q.dtype))
        queries = replace(queries, q=q, grad_out=grad_out)
        keys, columns = with_kv(keys, loadable), with_kv(columns, loadable)
        task = launching.query_task(keys, columns)
        values = row_values_of(queries, task)
        into.query.finish_rows(task.q_valid_tokens)
        with query_gradient(into.query) as of_query:
            grad_query(queries, keys, columns, values, of_query)
        if keys is not None and into.keys is not None:
            with key_gradients(into.keys) as of_keys:
                grad_key_value(queries, keys, values, of_keys)
        if columns is not None and into.columns is not None:
            into.columns.put(*grad_columns(queries, columns, values))

    def row_products(self, left: Tensor, right: Tensor) -> Tensor:
        """See Backend."""
        return passes.row_products(left, right)

    def with_sinks(self, out: Tensor, lse: Tensor, sinks: Tensor) -> Partial:
        """See Backend."""
        return launch_with_sinks(out, lse, sinks)

    def add_up(self, target: Tensor, parts: Tensor, *, add: bool) -> None:
        """See Backend. target may be some heads of a contiguous [B, S, H, D]."""
        passes.add_up(target, parts, add=add)

    def gather_columns(self, k: Tensor, v: Tensor, index: ColumnIndex) -> Tensor:
        """See Backend."""
        return passes.gather(k, v, index.data)

    def scatter_columns(self, grad_columns: tuple[Tensor, Tensor], index: ColumnIndex, into: KeyGradients) -> None:
        """See Backend."""
        passes.scatter(*grad_columns, index.data, grad_k=into.k, grad_v=into.v)


register(Triton())


def _with_work(keys: Keys | None, columns: Columns | None, into: Gradients) -> tuple[Keys | None, Columns | None]:
    """The parts that have any; begun sums of the others, and of rows that no launch writes, become 0."""
    rows = 0 if keys is None or not keys.index.data.q_valid_tokens else keys.index.data.k_valid_tokens
    if into.keys is not None and not into.keys.add:
        into.keys.k[:, rows:], into.keys.v[:, rows:] = 0, 0
    slots = 0 if columns is None or not columns.index.data.q_valid_tokens else columns.k.shape[2]
    if into.columns is not None and not into.columns.add and not slots:
        into.columns.k[:], into.columns.v[:] = 0, 0
    return keys if rows else None, columns if slots else None
