"""Estimated training steps beside measured ones: what `sparsering estimate` would have said of results that exist.

Reads results of benchmarks/training.py, draws each row's masks again, and estimates the same step on a cluster,
choosing as it was measured. Writes rows of the kind `fidelity`, which `sparsering validate` reads; rows of one model on
H100s and H200s were used to fit what share of a GPU's rates the layers around attention reach (`calibration`). Rings
that were measured without a warm-up say so in their name. No GPU is needed.

    python -m sparsering.benchmarks.estimate results/training-h200x4-*.json --cluster h200-nvlink-8
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..planner.cost.cluster import Cluster, load_cluster, preset_names
from ..planner.layouts.registry import parse_layout
from ..planner.plan import AttentionSpec, KernelSpec, ModelShape, PatternSpec, Plan, make_plan
from ..planner.schedule.placement import striped
from ..planner.step.parts import AttentionTimes, estimate_step
from ..runtime.train.config import TrainConfig, parse_config
from ..runtime.train.estimate.attention import LayerTimes, dense_layer, layer_times
from ..runtime.train.estimate.memory import memory_bytes
from ..runtime.train.estimate.sizes import step_settings, transformer_sizes
from ..runtime.train.model import ModelFacts, model_facts, read_model_config
from ..runtime.train.plan import resolve_plan
from ..simulator.simulate_plan import simulate_plan
from ..traces.files import read_json, write_json
from .lib.common import RESULTS, ResultFile
from .lib.masks import density_of
from .lib.ring_plans import make_work
from .training import BLOCK_SIZE, QWEN25_3B
from .training import parser as training_parser

FITTED = ("ours-triton", "ours-flash4")  # with a warm-up: what the shares of rates were fitted to


def main() -> None:
    """Estimate every row that can be, and write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("measured", type=Path, nargs="+", help="result files of benchmarks/training.py")
    parser.add_argument("--cluster", required=True, help=f"where they ran: a file or {', '.join(preset_names())}")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    result = ResultFile("fidelity", folder=arguments.results)
    with tempfile.TemporaryDirectory() as folder:
        rows = _rows(arguments.measured, load_cluster(arguments.cluster), Path(folder))
        result.write_as_they_come(rows, json.dumps)
    print(result.path)


def _rows(files: list[Path], cluster: Cluster, folder: Path) -> Iterator[dict[str, Any]]:
    for file in files:
        document = read_json(file)
        options = training_parser().parse_args(shlex.split(document["command"])[1:])
        for row in document["rows"]:
            if row["impl"] in ("ours-triton", "ours-flash4", "dense-zigzag-cudnn"):
                yield Step(row, options, cluster, folder).beside_measured(file.stem)


class Step:
    """One measured row, and the step that its command describes."""

    def __init__(self, row: dict[str, Any], options: argparse.Namespace, cluster: Cluster, folder: Path) -> None:
        self.row, self.options, self.cluster = row, options, cluster
        self.sparse = row["impl"].startswith("ours")
        write_json(folder / "config.json", QWEN25_3B | {"num_hidden_layers": options.layers})
        self.config = self._config(folder)
        self.model_config = read_model_config(self.config.model)
        self.facts: ModelFacts = model_facts(self.model_config)

    def beside_measured(self, name: str) -> dict[str, Any]:
        """Return the row of a result."""
        row = self.row
        plan, layer = self._attention()
        layers = self.facts.shape.layers
        times = AttentionTimes(
            forward_us=layer.forward_us * layers,
            backward_us=layer.backward_us * layers,
            choosing_us=row["choosing_ms"] * 1e3,
        )
        settings = step_settings(self.config, self.model_config, self.facts, plan)
        sizes = transformer_sizes(self.model_config, self.facts)
        step = estimate_step(sizes, settings, self.cluster, times, tokens=row["seq_len"])
        warm = row.get("warmups", 1) > 0
        return {
            "configuration": f"{name} {row['impl']} density {row['density']:.4f}{'' if warm else ', no warm-up'}",
            "direction": "step",
            "measured_us": row["step_ms"] * 1e3,
            "predicted_us": step.us,
            **(self._memory(plan) if warm else {}),  # before the first step there are no optimizer states
            "measured_attention_us": row["attention_ms"] * 1e3,
            "predicted_attention_us": times.forward_us + times.backward_us,
            "measured_other_us": (row["other_ms"] - row["choosing_ms"]) * 1e3,
            "predicted_other_us": step.us - times.forward_us - times.backward_us - times.choosing_us,
            "calibration": row["impl"] in FITTED and warm,
            "seq_len": row["seq_len"],
            "world_size": row["world_size"],
            "heads": self.facts.shape.heads,
        }

    def _memory(self, plan: Plan) -> dict[str, int]:
        parts = memory_bytes(self.config, self.model_config, self.facts, plan)
        return {"measured_bytes": self.row["memory_bytes"], "predicted_bytes": parts["total"]}

    def _attention(self) -> tuple[Plan, LayerTimes]:
        if not self.sparse:
            plan, _, _ = resolve_plan(self.config, self.facts.shape, device="cuda")
            return plan, dense_layer(plan, self.cluster, simulate_plan)
        plan = self._plan(self.facts.shape)
        drawn = [self._work(seed) for seed in range(self.options.seed, self.options.seed + 4)]
        patterns = {number: work.pattern for number, work in enumerate(drawn)}
        return plan, layer_times(plan, patterns, self.cluster, simulate_plan)

    def _work(self, seed: int) -> Any:
        """Draw the mask of a seed at the density that was asked for: the one that gives the row's."""
        row, options = self.row, self.options
        drawn = [
            make_work("slash", seq_len=row["seq_len"], density=density, columns=row["columns"], seed=seed)
            for density in options.density
        ]
        return min(drawn, key=lambda work: abs(density_of(work.mask) - row["density"]))

    def _plan(self, shape: ModelShape) -> Plan:
        row = self.row
        layout = re.sub(r"\b(pull|keep_kv)=1\b", r"\1", row["layout"])  # as older results wrote what is true
        forward, _, backward = layout.partition("/")
        return make_plan(
            attention=AttentionSpec(model=shape, seq_len_tokens=row["seq_len"], block_size=BLOCK_SIZE,
                                    dtype="bfloat16", columns_capacity=row["columns"]),
            placement=striped(seq_len_tokens=row["seq_len"], world_size=row["world_size"],
                              granularity_tokens=BLOCK_SIZE),
            forward=parse_layout(forward), backward=parse_layout(backward or forward),
            pattern=PatternSpec(source="trace"),
            kernels=KernelSpec.model_validate({"backend": row["impl"].removeprefix("ours-")}),
        )  # fmt: skip

    def _config(self, folder: Path) -> TrainConfig:
        row, options = self.row, self.options
        whole = options.whole_layers
        if not self.sparse and options.dense_whole_layers is not None:
            whole = options.dense_whole_layers
        return parse_config(
            {
                "model": {"path": folder, "random_weights": True},
                "data": {"folder": folder},
                "seq_len_tokens": row["seq_len"],
                "steps": 1,
                "attention": "planned" if self.sparse else "dense-zigzag",
                "parallel": {"context": row["world_size"]},
                "device": "cuda",
                "memory": {"fused_layers": options.fused_layers, "whole_layers": whole, "loss": options.loss},
            }
        )


if __name__ == "__main__":
    main()
