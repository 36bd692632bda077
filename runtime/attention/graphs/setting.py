"""Whether a plan's layers are played by CUDA graphs: a setting, and what stands against it."""

from __future__ import annotations

from ....traces.errors import UnsupportedError
from ..bound import BoundPlan
from .graphs import CudaGraphs, Graphs
from .words import GraphsSetting

# Of a rank's queries: where copying them costs less than launching a layer's kernels one by one.
SHORT_BYTES = 128 << 20


def graphs_for(bound: BoundPlan, setting: GraphsSetting = "auto") -> Graphs | None:
    """Return what a plan's layers are recorded in; None where they are launched kernel by kernel.

    "auto": recorded where they can be and are short. Raises UnsupportedError where "always" cannot be. Ranks need not
    agree: a recorded layer communicates as any other.
    """
    if setting == "never":
        return None
    reason = _against(bound)
    if reason is not None:
        if setting == "always":
            raise UnsupportedError(reason, field="cuda_graphs")
        return None
    model, tokens = bound.plan.model, bound.own_positions.numel()
    query_bytes = tokens * model.heads * model.head_dim * bound.dtype.itemsize
    return Graphs(CudaGraphs()) if setting == "always" or query_bytes <= SHORT_BYTES else None


def _against(bound: BoundPlan) -> str | None:
    """Return why layers cannot be recorded, None if they can."""
    if bound.mesh.device.type != "cuda":
        return "need a GPU"
    if bound.backend != "triton":  # others were not tried
        return f"are for triton kernels, not for {bound.backend}"
    if any(program.schedule.shares for program in bound.programs.values()):
        return "are not for layouts that pull: a pull waits for numbers that rise with every layer"
    return None
