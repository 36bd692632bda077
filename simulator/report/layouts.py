"""The layouts that the search compared, as bars of predicted time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import plotly.graph_objects as go

from ...planner.plan import Plan
from .figures import BLUE, FAINT, GREEN, GREY, INK, styled

MOST_ROWS = 18
TIMES = ("forward_us", "backward_us", "step_time_us")


def layouts_figure(plan: Plan) -> go.Figure:
    """Return the plan, all plain layouts and the best of the others, quickest on top, forward and backward stacked."""
    rows = shown_rows(plan)
    figure = go.Figure()
    for direction, opacity in (("forward", 1.0), ("backward", 0.62)):
        ends = [f" {row['step_time_us']:,.0f} µs  {row['note']}" for row in rows] if direction == "backward" else None
        figure.add_bar(
            x=[row[f"{direction}_us"] for row in rows],
            y=[row["name"] for row in rows],
            orientation="h",
            marker={"color": [row["colour"] for row in rows], "opacity": opacity, "line": {"width": 0}},
            customdata=[[row["note"], row["step_time_us"]] for row in rows],
            hovertemplate=f"%{{y}}<br>{direction} %{{x:,.0f}} µs of %{{customdata[1]:,.0f}} µs"
            "<br>%{customdata[0]}<extra></extra>",
            text=ends,
            textposition="outside",
            cliponaxis=False,
            textfont={"size": 12, "color": INK},
            showlegend=False,
        )
    bound = plan.predictions["bound_us"]
    longest = max(row["step_time_us"] for row in rows)
    figure.add_vline(x=bound, line={"color": FAINT, "dash": "dot", "width": 1.5})
    figure.add_annotation(x=bound, y=1.0, yref="paper", yanchor="bottom", showarrow=False,
                          text=f"lower bound {bound:,.0f} µs")  # fmt: skip
    figure.update_yaxes(autorange="reversed", showgrid=False, tickfont={"size": 12.5})
    figure.update_xaxes(title="predicted time of one layer: forward (dark) + backward (light), µs",
                        range=[0, longest * 1.3])  # fmt: skip
    return styled(figure, height=90 + 27 * len(rows), barmode="stack", bargap=0.25,
                  margin={"l": 300, "r": 24, "t": 34, "b": 52})  # fmt: skip


def shown_rows(plan: Plan) -> list[dict[str, Any]]:
    """Return at most 18 rows, quickest first: all plain layouts, the best others, and the plan itself."""
    told = plan.predictions
    plain = [row for row in told["candidates"] if row["baseline"]]
    others = [row for row in told["candidates"] if not row["baseline"]]
    others.sort(key=lambda row: (row["evaluator"] != told["evaluator"], row["step_time_us"]))
    rows = [_row(row, told["evaluator"]) for row in [*plain, *others[: MOST_ROWS - 1 - len(plain)]]]
    picked = {"name": "<b>the plan</b>", "note": "", "colour": GREEN, **{key: told[key] for key in TIMES}}
    return sorted([picked, *rows], key=lambda row: (row["step_time_us"], row is not picked))


def _row(row: Mapping[str, Any], evaluator: str) -> dict[str, Any]:
    remarks = [
        "plain" if row["baseline"] else "",
        row["why_not"] or "",
        "" if row["fits_memory"] else "too large",
        "" if row["evaluator"] == evaluator else "estimate",
    ]
    name, note = f"{row['placement']} {row['granularity_tokens']} · {row['in_words']}", ", ".join(filter(None, remarks))
    colour = BLUE if row["baseline"] else GREY
    return {"name": name, "note": note, "colour": colour, **{key: row[key] for key in TIMES}}
