"""From a trace and a cluster to a plan: the library's way to what `sparsering plan` does."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from ...traces.dataset.manifest import library_versions
from ...traces.dataset.store import Trace
from ...traces.errors import InputError, UnsupportedError
from ...traces.files import canonical_json, sha256_of_bytes
from ..backends import computed_head_dim
from ..check.check import check, check_step
from ..cost.cluster import Cluster
from ..cost.compiled import CompiledRecurrence
from ..cost.evaluation import Evaluator
from ..cost.kernels import ACCUMULATOR_BYTES, CostModel, datasheet_cost
from ..plan import ELEMENT_BYTES, DType, KernelSpec, ModelShape, Plan, TunedLaunches, make_plan
from ..schedule.schedule import DIRECTIONS
from .sampling import Progress, no_progress, pattern_spec, summarize, take_samples
from .scores import Problem, ScoreBoard, Step
from .selection import select
from .verdict import predictions

DEFAULT_MEMORY_FRACTION = 0.5  # the rest is for weights, optimizer, activations of the other layers


def plan_trace(
    trace: Trace,
    cluster: Cluster,
    *,
    evaluator: Evaluator | None = None,
    evaluator_name: str = "simulator",
    cost: CostModel | None = None,
    dtype: DType = "bfloat16",
    backend: str = "triton",
    tuned: TunedLaunches | None = None,
    memory_limit_bytes: int | None = None,
    memory_fraction: float = DEFAULT_MEMORY_FRACTION,
    steps: Sequence[int] | None = None,
    layers: Sequence[int] | None = None,
    layouts: Sequence[str] | None = None,
    placements: Sequence[str] | None = None,
    narrow_gradients: bool = False,
    pulls: bool = True,
    pattern: str = "trace",
    seed: int = 0,
    command: str = "",
    progress: Progress = no_progress,
) -> Plan:
    """Return the best executable plan for the trace's patterns on all GPUs of the cluster.

    evaluator: has the last word over the best few and all plain layouts (the simulator's); None: the recurrence alone.
    cost: times of launches; by default from the cluster's datasheet.
    memory_limit_bytes: for one layer's attention on one GPU; by default `memory_fraction` of the GPU's memory.
    steps, layers: what to evaluate on; by default up to four evenly spread layers of the last training step.
    tuned: launches that the plan's kernels shall prefer.
    layouts, placements: names to restrict the pick to. narrow_gradients: whether what a rank adds to dK/dV of
    others (with two_level: a node's sum of them) may be rounded to 16 bits, once, before it travels. pulls: whether
    ranks may pull where the cluster's file says how fast. pattern: "trace" to replay it, "choose" to choose as it did.
    Raises InputError, in one line, for what cannot be planned.
    """
    if narrow_gradients and ELEMENT_BYTES[dtype] >= ACCUMULATOR_BYTES:
        raise InputError(f"sums are kept in {dtype} as it is: nothing to round", field="narrow_gradients")
    header = trace.header
    if header.origin == "real" and header.audit_sha256 is None:
        raise UnsupportedError("is missing: nobody audited the model; capture it anew", source=trace.folder,
                               field="audit_sha256")  # fmt: skip
    model = ModelShape(**header.model.model_dump(exclude={"model_id"}))
    computed_head_dim(backend, head_dim=model.head_dim, dtype=dtype, block_size=header.block_size)
    problem = Problem(
        cluster=cluster,
        cost=cost or datasheet_cost(cluster.gpu, model, block_size=header.block_size, dtype=dtype, backend=backend),
        model=model,
        seq_len_tokens=header.seq_len_tokens,
        block_size=header.block_size,
        dtype=dtype,
        backend=backend,
        memory_limit_bytes=_memory_limit_bytes(cluster, memory_limit_bytes, memory_fraction),
        samples=take_samples(trace, steps=steps, layers=layers),
        replayed=pattern == "trace",
        narrow_gradients=narrow_gradients,
        pulls=pulls,
        summary=summarize(trace, progress=progress),
    )
    spec = pattern_spec(trace, pattern, problem.samples)
    selection = select(
        problem,
        quick=CompiledRecurrence(),
        final=evaluator,
        final_name=evaluator_name,
        layouts=layouts,
        placements=placements,
        progress=progress,
    )
    return _seal(
        problem,
        selection.pick,
        kernels=KernelSpec.model_validate({"backend": backend, "tuned": tuned}),
        pattern=spec,
        predictions=predictions(problem, selection, restricted=bool(layouts or placements)),
        provenance=_provenance(trace, cluster, seed=seed, command=command),
    )


def cluster_sha256(cluster: Cluster) -> str:
    """Return the SHA-256 of a cluster's content, whatever the layout of its YAML."""
    return sha256_of_bytes(canonical_json(cluster.model_dump(mode="json")))


def _seal(problem: Problem, pick: Step, **parts: Any) -> Plan:
    """Return the plan of the pick, its schedules proved."""
    board = ScoreBoard(problem=problem)
    plan = make_plan(
        model=problem.model,
        seq_len_tokens=problem.seq_len_tokens,
        block_size=problem.block_size,
        dtype=problem.dtype,
        columns_capacity=problem.summary.columns_capacity,
        placement=board.placement(pick.placement),
        forward=(pick.forward_layout.layout, dict(pick.forward_layout.parameters)),
        backward=(pick.backward_layout.layout, dict(pick.backward_layout.parameters)),
        pairs=board.pairs(pick.placement),
        head_orders=problem.head_orders(max(pick.forward_layout.degree, pick.backward_layout.degree)),
        **parts,
    )
    check_step(plan.schedule("forward"), plan.schedule("backward"))
    for direction in DIRECTIONS:
        check(plan.schedule(direction), inactive=plan.active_pairs().left_out())
    return plan


def _memory_limit_bytes(cluster: Cluster, limit_bytes: int | None, fraction: float) -> int:
    if limit_bytes is None:
        if not 0.0 < fraction <= 1.0:
            raise InputError(f"must be above 0 and at most 1, not {fraction}", field="memory_fraction")
        return int(fraction * cluster.gpu.memory_bytes)
    if limit_bytes < 1:
        raise InputError(f"must be positive, not {limit_bytes}", field="memory_limit_bytes")
    return limit_bytes


def _provenance(trace: Trace, cluster: Cluster, *, seed: int, command: str) -> dict[str, Any]:
    return {
        "trace": trace.folder.name,
        "trace_sha256": trace.digest(),
        "trace_origin": trace.header.origin,
        "model_id": trace.header.model.model_id,
        "cluster": cluster.name,
        "cluster_sha256": cluster_sha256(cluster),
        "versions": library_versions("sparsering", "numpy", "scipy"),
        "command": command,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "seed": seed,
    }
