"""From a trace and a cluster to a plan: the library's way to what `sparsering plan` does."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from ...traces.dataset.manifest import library_versions
from ...traces.dataset.store import Trace
from ...traces.errors import UnsupportedError
from ...traces.files import canonical_json, sha256_of_bytes
from ...traces.progress import Progress, no_progress
from ..check.check import check, check_step
from ..cost.cluster import Cluster
from ..cost.evaluation import Evaluator
from ..cost.measured import cluster_cost
from ..cost.model import CostModel
from ..cost.recurrence import CompiledRecurrence
from ..layouts.layout import Layout
from ..plan import AttentionSpec, PatternSpec, Plan, built_schedule, make_plan
from ..resting import no_collections
from ..schedule.backends import computed_head_dim, require_elements
from ..schedule.schedule import Direction
from .aside import forward_scorer
from .estimates import ALL_PLACED_RANKS
from .problem import Problem, SearchSpace
from .sampling import model_of, pattern_spec, summarize, take_samples
from .scores import ScoreBoard, Step
from .selection import GOOD, QUICK, select
from .verdict import predictions

ANY = SearchSpace()


def plan_trace(
    trace: Trace,
    cluster: Cluster,
    space: SearchSpace = ANY,
    *,
    evaluator: Evaluator | None = None,
    cost: CostModel | None = None,
    provenance: Mapping[str, Any] | None = None,
    progress: Progress = no_progress,
    processes: int = 1,
) -> Plan:
    """Return the best executable plan for the trace's patterns on all GPUs of the cluster.

    space: what may be picked. evaluator: has the last word over the best few and all plain layouts (the simulator's);
    None: the recurrence alone. cost: times of launches; by default from the cluster's datasheet. provenance: to be
    recorded in the plan beside what is known here. processes: 2: another one scores forward while this one scores
    backward, where there are so many ranks that it pays; the plan is the same. It is started anew, so a script must be
    one that can be imported (`if __name__ == "__main__"`), and evaluators must be functions that can be pickled.
    Raises InputError, in one line, for what cannot be planned.
    """
    if trace.header.origin == "real" and trace.header.audit_sha256 is None:
        raise UnsupportedError("is missing: nobody audited the model; capture it anew", source=trace.folder,
                               field="audit_sha256")  # fmt: skip
    with forward_scorer(wanted=processes > 1 and cluster.world_size > ALL_PLACED_RANKS) as aside:
        problem = make_problem(trace, cluster, space, cost=cost, progress=progress)
        pattern = pattern_spec(trace, space.pattern, problem.samples, summary=problem.summary)
        if aside is not None:
            aside.begin(problem, {QUICK: CompiledRecurrence()} | ({} if evaluator is None else {GOOD: evaluator}))
        with no_collections():
            quick = CompiledRecurrence()
            selection = select(problem, quick=quick, final=evaluator, progress=progress, aside=aside)
    with no_collections():
        plan = _seal(problem, selection.pick, pattern)
    return plan.with_record(
        predictions=predictions(problem, selection), provenance=_provenance(trace, cluster) | dict(provenance or {})
    )


def make_problem(
    trace: Trace,
    cluster: Cluster,
    space: SearchSpace,
    *,
    cost: CostModel | None = None,
    progress: Progress = no_progress,
) -> Problem:
    """Read from a trace what a search is given; InputError for layers that it lacks and heads that kernels lack."""
    header, backend = trace.header, space.kernels.backend
    model = model_of(trace)
    computed_head_dim(backend, head_dim=model.head_dim, dtype=space.dtype, block_size=header.block_size)
    samples = take_samples(trace, steps=space.steps, layers=space.layers)
    summary = summarize(trace, progress=progress)
    asked = [("pattern.windowed", True)] if summary.windowed else []
    for field, value in [*asked, *model.asked_of_elements(header.seq_len_tokens)]:
        require_elements(backend, field=field, value=value)
    return Problem(
        space=space,
        cluster=cluster,
        cost=cost or cluster_cost(cluster, model, block_size=header.block_size, dtype=space.dtype, backend=backend),
        attention=AttentionSpec(
            model=model,
            seq_len_tokens=header.seq_len_tokens,
            block_size=header.block_size,
            dtype=space.dtype,
            columns_capacity=summary.columns_capacity,
        ),
        samples=samples,
        summary=summary,
    )


def _seal(problem: Problem, pick: Step, pattern: PatternSpec) -> Plan:
    """Return the plan of the pick, its schedules proved."""
    board = ScoreBoard(problem=problem)
    placement, pairs = board.placement(pick.placement), board.pairs(pick.placement)
    shape = problem.shape(placement)
    layouts: dict[Direction, Layout] = {"forward": pick.forward_layout, "backward": pick.backward_layout}
    schedules = {way: built_schedule(layout, shape, way, pairs) for way, layout in layouts.items()}
    check_step(schedules["forward"], schedules["backward"])
    for schedule in schedules.values():  # one after the other: of hundreds of ranks each takes a gigabyte, expanded
        check(schedule, inactive=pairs.left_out())
        schedule.sha256()
        schedule.forget()
    return make_plan(
        attention=problem.attention,
        placement=placement,
        forward=pick.forward_layout,
        backward=pick.backward_layout,
        pattern=pattern,
        kernels=problem.space.kernels,
        pairs=pairs,
        head_orders=problem.head_orders(max(pick.forward_layout.head_groups, pick.backward_layout.head_groups)),
    )


def _provenance(trace: Trace, cluster: Cluster) -> dict[str, Any]:
    return {
        "trace": trace.folder.name,
        "trace_sha256": trace.digest(),
        "trace_origin": trace.header.origin,
        "model_id": trace.header.model.model_id,
        "cluster": cluster.name,
        "cluster_sha256": sha256_of_bytes(canonical_json(cluster.model_dump(mode="json"))),
        "versions": library_versions("sparsering", "numpy", "scipy"),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
