"""The README's script runs as it stands, on two gloo ranks, and gives the loss and gradients of the model alone."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from model_cases import case_config, dense_plan
from sparsering.planner.plan import PatternSpec
from sparsering.runtime.model.shape import model_shape
from sparsering.traces.dataset.manifest import TraceHeader, library_versions
from sparsering.traces.dataset.rows import HeadChoice
from sparsering.traces.dataset.store import Trace
from sparsering.traces.dataset.writer import TraceWriter
from sparsering.traces.pattern import LayerPattern, VerticalSlash

ROOT = Path(__file__).resolve().parents[2]
SEQ_LEN_TOKENS, BLOCK_SIZE, RANKS = 256, 64, 2
# Runs the README's text as the main program and keeps what it leaves: nothing of it is changed.
DRIVER = """
import os, runpy, torch
from safetensors.torch import save_file
left = runpy.run_path("snippet.py", run_name="__main__")
gradients = {name: parameter.grad for name, parameter in left["model"].named_parameters()}
save_file(gradients | {"loss": left["loss"].detach()}, f"rank-{os.environ['RANK']}.safetensors")
"""


def write_trace(folder: Path, config: object) -> Trace:
    """Write a trace in which every head attends every block, so that the plan is dense."""
    shape = model_shape(config)
    header = TraceHeader.model_validate(
        {
            "model": {"model_id": "tiny", **shape.model_dump()},
            "recorded_layers": tuple(range(shape.layers)),
            "seq_len_tokens": SEQ_LEN_TOKENS,
            "block_size": BLOCK_SIZE,
            "origin": "synthetic",
            "seed": 0,
            "versions": library_versions("sparsering"),
        }
    )
    head = VerticalSlash(
        columns=np.zeros(0, np.int32), diagonals=np.arange(SEQ_LEN_TOKENS // BLOCK_SIZE, dtype=np.int32)
    )
    pattern = LayerPattern(seq_len_tokens=SEQ_LEN_TOKENS, block_size=BLOCK_SIZE, heads=(head,) * shape.heads)
    choice = HeadChoice(selector="sink-window", settings={}, kept_mass_probe=1.0, kept_mass_sampled=1.0)
    with TraceWriter(folder, header) as writer:
        writer.append(0, {layer: (pattern, [choice] * shape.heads) for layer in range(shape.layers)})
    return Trace.open(folder)


@pytest.mark.examples
def test_the_readmes_script_gives_what_the_model_alone_gives(tmp_path: Path) -> None:
    (snippet,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (tmp_path / "snippet.py").write_text(snippet)
    (tmp_path / "driver.py").write_text(DRIVER)
    config = case_config("llama")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float64).save_pretrained(tmp_path / "path/to/model")
    trace = write_trace(tmp_path / "trace", config)
    pattern = PatternSpec(source="trace", trace_sha256=trace.digest())
    dense_plan(config, world_size=RANKS, pattern=pattern).save(tmp_path / "plan.json")
    ids = np.random.default_rng(0).integers(3, 256, SEQ_LEN_TOKENS)
    np.save(tmp_path / "tokens.npy", ids)

    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS)]
    environment = os.environ | {"PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*launcher, "driver.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]

    alone = AutoModelForCausalLM.from_pretrained(
        tmp_path / "path/to/model", dtype=torch.float64, attn_implementation="sdpa"
    )
    whole = torch.from_numpy(ids)[None]
    loss = alone(input_ids=whole, labels=whole).loss
    loss.backward()
    ranks = [load_file(tmp_path / f"rank-{rank}.safetensors") for rank in range(RANKS)]
    assert sum(rank["loss"].item() for rank in ranks) == pytest.approx(loss.item(), rel=1e-6)
    for name, parameter in alone.named_parameters():
        assert parameter.grad is not None
        size = float(parameter.grad.abs().max())
        for rank in ranks:
            torch.testing.assert_close(rank[name], parameter.grad, rtol=0, atol=1e-6 * size)
