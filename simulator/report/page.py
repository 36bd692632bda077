"""The demo's report: one self-contained page made of the files of its folder, and of nothing else.

`write_report` reads the trace, both plans, both timelines and metrics.json, so a page can be made again at any time.
What the figures show is in the files beside this one; the words are in templates/report.html.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from ...planner.cost.cluster import load_cluster
from ...planner.plan import Plan, load_plan
from ...traces.dataset.store import Trace
from ...traces.files import read_json, write_atomically
from ...traces.timeline import Timeline
from .figures import Figure, html_of
from .layouts import layouts_figure
from .load import Loads, load_figure, spread_loads
from .masks import masks_figure
from .timelines import timelines_figure

TEMPLATE = "report.html"
CLUSTER_PRESET = "a100-hdr-4x8"
PLAN_CLUSTER = "plan-a100x32.json"
PLAN_LOCAL = "plan-local4.json"


def write_report(folder: Path) -> None:
    """Write `folder`/report.html from the demo's other files in `folder`. InputError when one cannot be read."""
    metrics = read_json(folder / "metrics.json")
    trace = Trace.open(folder / "trace")
    cluster_plan, local_plan = load_plan(folder / PLAN_CLUSTER), load_plan(folder / PLAN_LOCAL)
    simulated, measured = (Timeline.load(folder / f"timeline-{name}.json.gz") for name in ("simulated", "measured"))
    layer = trace.layer_pattern(trace.steps[-1], metrics["layer"])
    loads = {
        "cluster": spread_loads(cluster_plan, layer, load_cluster(CLUSTER_PRESET)),
        "local": spread_loads(local_plan, layer),
    }
    figures = {
        "masks": masks_figure(trace),
        "cluster_load": load_figure(loads["cluster"]),
        "local_load": load_figure(loads["local"]),
        "layouts": layouts_figure(cluster_plan),
        "timelines": timelines_figure(simulated, measured),
    }
    page = _render(metrics, trace, cluster_plan, local_plan, loads, figures)
    write_atomically(folder / "report.html", page.encode())


def _render(
    metrics: Mapping[str, Any], trace: Trace, cluster_plan: Plan, local_plan: Plan,
    loads: Mapping[str, Sequence[Loads]], figures: Mapping[str, Figure],
) -> str:  # fmt: skip
    rows = metrics["trace"]["layers"]
    return rendered_page(
        TEMPLATE,
        {name: html_of(name, figure) for name, figure in figures.items()},
        sentence=sentence(cluster_plan),
        metrics=metrics,
        density=_mean(rows, "density_mean"),
        columns=_mean(rows, "columns_mean"),
        kept=_mean(rows, "kept_mass_sampled_mean"),
        worst_error=max((one["error"] for one in metrics["verification"]), default=0.0),
        trace=trace.header,
        trace_bytes=sum(path.stat().st_size for path in trace.folder.iterdir() if path.is_file()),
        cluster_plan=cluster_plan,
        local_plan=local_plan,
        in_words=in_words,
        loads=loads,
        directions=_compared(metrics),
        verification=worst_errors(metrics["verification"]),
    )


def rendered_page(template: str, figures: Mapping[str, str], **values: Any) -> str:
    """Return a template of this folder as a page that needs no network: plotly stands in it once.

    figures: HTML of `html_of` by name; they and `values` are what the template may use.
    """
    environment = Environment(
        loader=PackageLoader(__package__ or "sparsering.simulator.report", "templates"),
        autoescape=select_autoescape(["html"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "ms": lambda us: f"{us / 1e3:,.1f}",
        "duration": duration,
        "us": "{:,.0f}".format,
        "percent": "{:.0%}".format,
        "signed_percent": lambda share: f"{share:+.0%}".replace("-", "−"),
        "error": lambda value: f"{value:.1e}".replace("-", "−"),
    }
    drawn = {name: Markup(html) for name, html in figures.items()}
    return environment.get_template(template).render(figures=drawn, plotly=Markup(get_plotlyjs()), **values)


def sentence(plan: Plan) -> str:
    """Return the page's one sentence: what planning gains, as the plan itself says it."""
    verdict = plan.predictions["verdict"]
    return f"On {plan.world_size} A100s: {verdict[0].lower()}{verdict[1:]}"


def duration(us: float) -> str:
    """Return a time with three digits or so and the unit that suits it."""
    return f"{us / 1e6:.2f} s" if us >= 1e6 else f"{us / 1e3:.0f} ms" if us >= 1e5 else f"{us / 1e3:.1f} ms"


def _mean(rows: Sequence[Mapping[str, Any]], name: str) -> float:
    return sum(row[name] for row in rows) / len(rows)


def in_words(plan: Plan) -> str:
    """Return what a plan does, in a few words."""
    forward, backward = str(plan.forward.value), str(plan.backward.value)
    placed = f"{plan.placement.name} placement in units of {plan.placement.granularity_tokens} tokens"
    if forward == backward:
        return f"{placed}; {forward}"
    return f"{placed}; forward {forward}, backward {backward}"


def worst_errors(verdicts: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return one row per verified tensor: its largest error over all ranks and whether every rank passed."""
    rows = []
    for name in dict.fromkeys(one["name"] for one in verdicts):
        own = [one for one in verdicts if one["name"] == name]
        worst = max(own, key=lambda one: one["error"])
        rest = {"tolerance": min(one["tolerance"] for one in own), "ok": all(one["ok"] for one in own)}
        rows.append({"name": name, "error": worst["error"], "rank": worst["rank"], "ranks": len(own), **rest})
    return rows


def _compared(metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the simulated and the measured figures of each direction, phase by phase."""
    measured = {one["direction"]: one for one in metrics["measured"]}
    compared = []
    for simulated in metrics["simulated"]:
        other = measured[simulated["direction"]]
        phases = [
            {"phase": a["phase"], "simulated": a, "measured": b}
            for a, b in zip(simulated["phases"], other["phases"], strict=False)
        ]
        ratio = simulated["makespan_us"] / other["makespan_us"] - 1.0
        compared.append({"simulated": simulated, "measured": other, "phases": phases, "off": ratio})
    return compared
