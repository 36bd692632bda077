"""A selector in one file that only registers itself: captured, planned and attended on ranks, from that alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface
from typer.testing import CliRunner

import new_selector
from model_cases import case_model
from rank_pool import RankPool
from sparsering import cli
from sparsering.planner.plan import Plan, load_plan
from sparsering.traces.dataset.store import Trace
from sparsering.traces.pattern import element_mask

SEQ_LEN_TOKENS, WORLD_SIZE = 512, 2
CLUSTER = Path(cli.__file__).parent / "planner/presets/local-cpu-4.yaml"


def run(*arguments: str | int | Path) -> None:
    result = CliRunner().invoke(cli.app, list(map(str, arguments)))
    assert result.exit_code == 0, result.output


@pytest.fixture(scope="module")
def road(tmp_path_factory: pytest.TempPathFactory) -> tuple[np.ndarray, Trace, Plan]:
    """Token ids [1, S], what a case attends to of them by the command line, and the plan made from that."""
    folder = tmp_path_factory.mktemp("new-selector")
    case_model("llama").save_pretrained(folder / "model")
    ids = np.random.default_rng(0).integers(3, 256, SEQ_LEN_TOKENS)
    (folder / "text").write_bytes(bytes(ids.tolist()))
    run("capture", "--model", folder / "model", "--text", folder / "text", "--tokenizer", "byte", "--seq-len",
        SEQ_LEN_TOKENS, "--block-size", 64, "--sparse", "--selector", "long-keys", "--near-blocks", 1, "-o",
        folder / "trace")  # fmt: skip
    (folder / "two.yaml").write_text(CLUSTER.read_text().replace("gpus_per_node: 4", f"gpus_per_node: {WORLD_SIZE}"))
    run("plan", "--trace", folder / "trace", "--cluster", folder / "two.yaml", "--pattern", "choose", "--dtype",
        "float64", "--backend", "blockwise", "-o", folder / "plan.json")  # fmt: skip
    return ids[None], Trace.open(folder / "trace"), load_plan(folder / "plan.json")


def test_one_short_file_is_enough() -> None:
    assert Path(new_selector.__file__).read_text().count("\n") <= 80


def test_a_trace_and_a_plan_name_it_and_its_settings(road: tuple[np.ndarray, Trace, Plan]) -> None:
    _, trace, plan = road
    settings = {"near_blocks": 1, "long_blocks": 2}
    assert {row.choice.selector for row in trace.heads(0)} == {"long-keys"}
    assert all(row.choice.settings == settings for row in trace.heads(0))
    assert (plan.pattern.selector, plan.pattern.settings) == ("long-keys", settings)
    assert plan.world_size == WORLD_SIZE


def test_ranks_attend_as_the_model_alone_under_the_captured_masks(
    road: tuple[np.ndarray, Trace, Plan], rank_pools: Callable[[int], RankPool]
) -> None:
    ids, trace, plan = road
    alone = masked(case_model("llama"), trace)
    output = alone(input_ids=torch.from_numpy(ids), labels=torch.from_numpy(ids))
    output.loss.backward()
    results = rank_pools(WORLD_SIZE).run("selector_jobs.attended", name="llama", plan=plan, ids=ids)
    assert sum(result["loss"] for result in results) == pytest.approx(output.loss.item(), rel=1e-7)
    for result in results:
        wanted = output.logits[:, result["positions"]].detach().numpy()
        np.testing.assert_allclose(result["logits"], wanted, rtol=1e-6, atol=1e-6)  # norms round to float32
    for name, parameter in alone.named_parameters():
        summed = sum(result["gradients"][name] for result in results)
        assert parameter.grad is not None
        room = 1e-6 * float(parameter.grad.abs().max())
        np.testing.assert_allclose(summed, parameter.grad.numpy(), rtol=0, atol=room, err_msg=name)
    alone.set_attn_implementation("sdpa")
    dense = alone(input_ids=torch.from_numpy(ids)).logits
    assert (dense - output.logits).abs().max() > 1e-3, "the masks leave out what counts"


def masked(model: PreTrainedModel, trace: Trace) -> PreTrainedModel:
    """Make a model attend, by torch's own attention, what each head's captured pattern allows and nothing else."""
    allowed = [
        torch.from_numpy(np.stack([element_mask(pattern, head) for head in range(pattern.num_heads)]))
        for pattern in (trace.layer_pattern(0, layer) for layer in trace.layers)
    ]

    def attend(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: None, scaling: float, **_: Any) -> Any:
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=allowed[module.layer_idx], scale=scaling, enable_gqa=True
        )
        return out.transpose(1, 2), None

    AttentionInterface.register("test_masked", attend)
    AttentionMaskInterface.register("test_masked", lambda *arguments, **keywords: None)
    model.set_attn_implementation("test_masked")
    return model
