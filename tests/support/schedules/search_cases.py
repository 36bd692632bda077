"""What the searches of the tests are given, and evaluators that say what they are told to."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NoReturn

import numpy as np
from hypothesis import strategies as st

import tiny
from sparsering.planner.cost.evaluation import Evaluation
from sparsering.planner.cost.kernels import DatasheetCost
from sparsering.planner.plan import AttentionSpec, KernelSpec, ModelShape
from sparsering.planner.replay import Recorded
from sparsering.planner.schedule.workload import unit_load
from sparsering.planner.search.problem import Problem, SearchSpace, TraceSummary
from sparsering.traces.errors import ScheduleError
from sparsering.traces.synthetic import SyntheticSettings, synthesize

BLOCK = 64
KINDS = ["dense", "vertical-slash", "skewed", "xattention", "packed-documents"]
CLUSTERS = [(1, 1), (1, 2), (1, 4), (2, 2), (3, 2)]


def problem(
    *, kind: str = "vertical-slash", nodes: int = 1, gpus: int = 4, blocks: int = 16, layers: int = 1, seed: int = 0,
    backend: str = "triton", memory_limit_bytes: int = 1 << 30, columns: int = 20,
    placements: tuple[str, ...] = (), **hardware: Any,
) -> Problem:  # fmt: skip
    cluster = tiny.cluster(nodes=nodes, gpus=gpus, **hardware)
    drawn = SyntheticSettings(
        seq_len_tokens=blocks * BLOCK - 10, block_size=BLOCK, heads=4, columns=columns, density=0.2,
        mean_document_tokens=3 * BLOCK,
    )  # fmt: skip
    patterns = [synthesize(kind, drawn, seed=seed, layer=layer) for layer in range(layers)]
    most_columns = max(pattern.max_columns for pattern in patterns)
    return Problem(
        space=SearchSpace(
            memory_limit_bytes=memory_limit_bytes,
            placements=placements,
            kernels=KernelSpec.model_validate({"backend": backend}),
        ),
        cluster=cluster,
        cost=DatasheetCost(gpu=cluster.gpu, head_dim=64, block_size=BLOCK),
        attention=AttentionSpec(
            model=ModelShape(layers=layers, heads=4, kv_heads=2, head_dim=64),
            seq_len_tokens=drawn.seq_len_tokens,
            block_size=BLOCK,
            dtype="bfloat16",
            columns_capacity=-(-most_columns // 64) * 64,
        ),
        samples=tuple(
            Recorded(training_step=0, layer=layer, pattern=pattern) for layer, pattern in enumerate(patterns)
        ),
        summary=TraceSummary(
            columns_capacity=-(-most_columns // 64) * 64,
            block_load=unit_load(patterns, granularity_tokens=BLOCK, padded_tokens=blocks * BLOCK),
            loaded_layers=layers,
            recorded_layers=layers,
        ),
    )  # fmt: skip


def allowing(given_problem: Problem, **changes: Any) -> Problem:
    """Return the problem with other values in what may be picked."""
    return replace(given_problem, space=replace(given_problem.space, **changes))


def of_model(given_problem: Problem, **changes: Any) -> Problem:
    """Return the problem for a model with other values."""
    model = given_problem.attention.model.model_copy(update=changes)
    return replace(given_problem, attention=given_problem.attention.model_copy(update={"model": model}))


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    nodes, gpus = draw(st.sampled_from(CLUSTERS))
    return problem(
        kind=draw(st.sampled_from(KINDS)),
        nodes=nodes,
        gpus=gpus,
        blocks=draw(st.integers(4, 24)),
        layers=draw(st.integers(1, 2)),
        seed=draw(st.integers(0, 9)),
        backend=draw(st.sampled_from(["triton", "blockwise"])),
        bandwidth=draw(st.sampled_from([1000.0, 1e5])),
        pull_bandwidth=draw(st.sampled_from([None, 2e5])),
    )


def senseless(makespan_us: float, world_size: int) -> Evaluation:
    return Evaluation(
        makespan_us=makespan_us,
        compute_us=np.ones(world_size),
        phase_us=np.ones((world_size, 1)),
        peak_buffer_bytes=0,
    )


def refuses(schedule, workload, cluster, cost) -> NoReturn:
    """Say that nothing ever ends; other processes can import this evaluator."""
    raise ScheduleError("rank 3 waits for ever")
