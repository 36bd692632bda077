"""sparsering: record a model's dynamic sparse attention, plan how to spread it over GPUs, run that plan.

The public face. Names are imported when they are first used, so that `sparsering.kernels` works where pydantic and
scipy are not installed, and `sparsering.planner` works where torch is not.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .planner.cost.cluster import Cluster as Cluster
    from .planner.cost.cluster import load_cluster as load_cluster
    from .planner.plan import Plan as Plan
    from .planner.plan import load_plan as load_plan
    from .planner.search.problem import SearchSpace as SearchSpace
    from .runtime.audit.audit import audit as audit
    from .runtime.comm.mesh import Mesh as Mesh
    from .runtime.comm.mesh import join as join
    from .runtime.comm.mesh import leave as leave
    from .runtime.hf.attach import attach as attach
    from .runtime.model.shard import shard as shard
    from .traces.dataset.store import Trace as Trace
    from .traces.errors import InputError as InputError
    from .traces.pattern import BlockMask as BlockMask
    from .traces.pattern import LayerPattern as LayerPattern
    from .traces.pattern import VerticalSlash as VerticalSlash
    from .traces.timeline import Timeline as Timeline

__version__ = "0.1.0"

# public name -> module below this package that defines it
_HOMES = {
    "BlockMask": "traces.pattern",
    "Cluster": "planner.cost.cluster",
    "InputError": "traces.errors",
    "LayerPattern": "traces.pattern",
    "Mesh": "runtime.comm.mesh",
    "Plan": "planner.plan",
    "SearchSpace": "planner.search.problem",
    "Timeline": "traces.timeline",
    "Trace": "traces.dataset.store",
    "VerticalSlash": "traces.pattern",
    "attach": "runtime.hf.attach",
    "audit": "runtime.audit.audit",
    "join": "runtime.comm.mesh",
    "leave": "runtime.comm.mesh",
    "load_cluster": "planner.cost.cluster",
    "load_plan": "planner.plan",
    "shard": "runtime.model.shard",
}
_HOUSES = ("kernels", "planner", "runtime", "simulator", "traces")


def __getattr__(name: str) -> Any:
    if name in _HOUSES:
        return import_module(f"{__name__}.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES, *_HOUSES})


def plan_trace(trace: Trace, cluster: Cluster, space: SearchSpace | None = None, **settings: Any) -> Plan:
    """Return the best plan for a trace on a cluster, the simulator having the last word. space: what may be picked.

    Settings and errors are those of `planner.search.search.plan_trace`, which alone would judge by its own recurrence:
    the planner does not import the simulator, so it is handed over here.
    """
    from .planner.search.problem import SearchSpace
    from .planner.search.search import plan_trace as search
    from .simulator.engine import simulate

    return search(trace, cluster, space or SearchSpace(), **{"evaluator": simulate, **settings})
