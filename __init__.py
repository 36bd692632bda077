"""sparsering: record a model's dynamic sparse attention, plan how to spread it over GPUs, run that plan.

The public face. Names are imported when they are first used, so that `sparsering.kernels` works where pydantic and
simpy are not installed, and `sparsering.planner` works where torch is not.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .planner.cluster import Cluster as Cluster
    from .planner.cluster import load_cluster as load_cluster
    from .planner.plan import Plan as Plan
    from .planner.plan import load_plan as load_plan
    from .runtime.hf.attach import attach as attach
    from .runtime.hf.audit import audit as audit
    from .runtime.hf.shard import shard as shard
    from .runtime.mesh import Mesh as Mesh
    from .runtime.mesh import join as join
    from .runtime.mesh import leave as leave
    from .traces.errors import InputError as InputError
    from .traces.pattern import BlockMask as BlockMask
    from .traces.pattern import LayerPattern as LayerPattern
    from .traces.pattern import VerticalSlash as VerticalSlash
    from .traces.store import Trace as Trace
    from .traces.timeline import Timeline as Timeline

__version__ = "0.1.0"

# public name -> module below this package that defines it
_HOMES = {
    "BlockMask": "traces.pattern",
    "Cluster": "planner.cluster",
    "InputError": "traces.errors",
    "LayerPattern": "traces.pattern",
    "Mesh": "runtime.mesh",
    "Plan": "planner.plan",
    "Timeline": "traces.timeline",
    "Trace": "traces.store",
    "VerticalSlash": "traces.pattern",
    "attach": "runtime.hf.attach",
    "audit": "runtime.hf.audit",
    "join": "runtime.mesh",
    "leave": "runtime.mesh",
    "load_cluster": "planner.cluster",
    "load_plan": "planner.plan",
    "shard": "runtime.hf.shard",
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


def plan_trace(trace: Trace, cluster: Cluster, **settings: Any) -> Plan:
    """Return the best plan for a trace on a cluster, the simulator having the last word.

    Settings and errors are those of `planner.search.plan_trace`, which alone would judge by its own recurrence: the
    planner does not import the simulator, so it is handed over here.
    """
    from .planner.search import plan_trace as search
    from .simulator.engine import simulate

    return search(trace, cluster, **{"evaluator": simulate, **settings})
