"""Parts of training that need no other process: loss, rate, angles, what is refused and how."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from transformers import AutoConfig, AutoModelForCausalLM

from model_cases import case_config
from sparsering.kernels.flash4 import launch as flash4_launch
from sparsering.planner.layouts.gather import Gather
from sparsering.planner.layouts.ring import Ring
from sparsering.planner.plan import AttentionSpec, KernelSpec, ModelShape, PatternSpec, make_plan
from sparsering.planner.schedule.placement import striped
from sparsering.runtime.model import shape
from sparsering.runtime.model.losses import linear_cross_entropy_sum
from sparsering.runtime.train.config import OptimizerSection, load_config, parse_config
from sparsering.runtime.train.model import model_facts, read_model_config
from sparsering.runtime.train.optimizer import learning_rate
from sparsering.runtime.train.setup import set_up
from sparsering.traces.errors import InputError
from train_runs import MODEL, SEQ_LEN_TOKENS, merged, write_model, write_run


@pytest.mark.parametrize("chunk_tokens", [1, 7, 64])
@pytest.mark.parametrize("valid", ["all", "some", "none"])
def test_chunked_cross_entropy_is_cross_entropy(chunk_tokens: int, valid: str) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(20, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(31, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 31, (20,), generator=generator)
    labels[{"all": 0, "some": 11, "none": 20}[valid] :] = -100 if valid != "all" else labels[0]
    wanted = F.cross_entropy(hidden @ weight.T, labels, reduction="sum", ignore_index=-100)
    wanted_grads = torch.autograd.grad(3.0 * wanted, (hidden, weight))
    total = linear_cross_entropy_sum(hidden, weight, labels, implementation="chunked", chunk_tokens=chunk_tokens)
    grads = torch.autograd.grad(3.0 * total, (hidden, weight))
    torch.testing.assert_close(total, wanted, rtol=1e-12, atol=1e-12)
    for got, want in zip(grads, wanted_grads, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_the_rate_rises_then_follows_a_cosine() -> None:
    section = OptimizerSection(learning_rate=1.0, minimum_share=0.1, warmup_steps=4)
    rates = [learning_rate(step, section, 24) for step in range(24)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[14] == pytest.approx(0.1 + 0.9 * 0.5)  # half way
    assert rates[-1] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 19 / 20)))
    assert rates[4:] == sorted(rates[4:], reverse=True)


def _rotated(rotary: Any, vector: torch.Tensor, positions: list[int]) -> torch.Tensor:
    from transformers.models.qwen2.modeling_qwen2 import rotate_half

    cos, sin = rotary(vector, torch.tensor([positions]))
    return vector * cos + rotate_half(vector) * sin


def test_yarn_angles_are_shift_invariant_at_512k_positions(tmp_path: Path) -> None:
    yarn = {"rope_type": "yarn", "factor": 16.0, "rope_theta": 1e6, "original_max_position_embeddings": 32768}
    write_model(tmp_path, max_position_embeddings=524288, head_dim=64)
    section = parse_config(write_run(tmp_path / "run")).model.model_copy(
        update={"path": tmp_path, "rope_parameters": yarn}
    )
    config = read_model_config(section)
    rotary = AutoModelForCausalLM.from_config(config).base_model.rotary_emb
    assert rotary.inv_freq.dtype == torch.float32
    generator = torch.Generator().manual_seed(0)
    q, k = (F.normalize(torch.randn(1, 1, 64, generator=generator), dim=-1) for _ in range(2))

    def score(position: int, distance: int) -> float:
        return float((_rotated(rotary, q, [position]) * _rotated(rotary, k, [position - distance])).sum())

    # A float32 angle below 2^19 is off by at most 2^-6 radians, and the score of unit vectors by no more than both.
    for distance in (0, 1, 100, 5000):
        for position in (100_000, 300_001, 524_287):
            assert score(position, distance) == pytest.approx(score(distance, distance), abs=2 * 2**-6)
    plain = AutoConfig.from_pretrained(write_model(tmp_path / "plain", head_dim=64))
    assert not torch.equal(rotary.inv_freq, AutoModelForCausalLM.from_config(plain).base_model.rotary_emb.inv_freq)


def test_bfloat16_angles_would_not_be() -> None:
    """The check above can fail: the same angles rounded to bfloat16 lose the position altogether."""
    frequency = 1e6 ** (-torch.arange(0, 64, 2) / 64)
    angles = [[(p * frequency).bfloat16().float() for p in (q, q - 5)] for q in (5, 524_287)]
    near, far = (torch.cos(query - key) for query, key in angles)
    assert (near - far).abs().max() > 0.5


def test_parameters_are_counted_without_memory(tmp_path: Path) -> None:
    config = AutoConfig.from_pretrained(write_model(tmp_path))
    facts = model_facts(config)
    model = AutoModelForCausalLM.from_config(config)
    assert facts.parameters == sum(p.numel() for p in model.parameters())
    assert facts.matrix_parameters == facts.parameters  # the head's product is with the embedding
    untied = model_facts(AutoConfig.from_pretrained(write_model(tmp_path / "untied", tie_word_embeddings=False)))
    assert untied.matrix_parameters == facts.parameters
    assert untied.parameters == facts.parameters + 256 * 32
    assert facts.shape == ModelShape(layers=2, heads=4, kv_heads=2, head_dim=8)


def test_a_token_meets_the_experts_that_it_visits_only(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = model_facts(case_config("qwen3-moe"))
    experts = 2 * 4 * 3 * 64 * 32  # layers, experts, matrices, hidden, inner
    lookups = 256 * 64  # of the embedding, which is not the head's
    assert facts.matrix_parameters == facts.parameters - lookups - experts // 2
    dense = model_facts(case_config("llama"))
    assert dense.matrix_parameters == dense.parameters - lookups
    monkeypatch.setattr(shape, "EXPERTS_OF_A_TOKEN", ())  # as where a family has another name for it
    assert model_facts(case_config("qwen3-moe")).matrix_parameters is None


def _plan(folder: Path, **changes: Any) -> str:
    spec = {"model": ModelShape(layers=2, heads=4, kv_heads=2, head_dim=8), "seq_len_tokens": SEQ_LEN_TOKENS,
            "block_size": 64, "dtype": "float32", "columns_capacity": 0}  # fmt: skip
    attention = spec | {name: changes.pop(name) for name in spec if name in changes}
    window = {"sink_tokens": 0, "window_tokens": 64}
    arguments: dict[str, Any] = {
        "attention": AttentionSpec.model_validate(attention),
        "placement": striped(seq_len_tokens=SEQ_LEN_TOKENS, world_size=2, granularity_tokens=64),
        "forward": Gather(),
        "pattern": PatternSpec(source="choose", selector="sink-window", settings=window),
        "kernels": KernelSpec(backend="blockwise"),
    }
    make_plan(**(arguments | changes)).save(folder / "plan.json")
    return str(folder / "plan.json")


def test_a_plan_file_is_followed(tmp_path: Path) -> None:
    setup = set_up(parse_config(write_run(tmp_path, plan={"file": _plan(tmp_path)})))
    assert setup.made_here is None
    assert setup.summary()["plan_digest"] == setup.plan.digest
    memory = setup.summary()["memory_bytes_per_rank"]
    assert memory["total"] == sum(size for name, size in memory.items() if name != "total")
    assert memory["parameters"] == 4 * setup.facts.parameters // 2


def test_the_default_plan_is_of_the_layout_and_parameters_given(tmp_path: Path) -> None:
    plain = set_up(parse_config(write_run(tmp_path / "plain")))
    assert plain.plan.forward.value == Gather(chunks=1)
    assert "layout gather (chunks 1)" in (plain.made_here or "")
    kept = {"layout_parameters": {"keep_kv": True, "pull": True}}
    pulls = set_up(parse_config(write_run(tmp_path / "pulls", plan=kept)))
    for way in (pulls.plan.forward, pulls.plan.backward):
        assert way.value == Gather(chunks=1, keep_kv=True, pull=True)
    assert "layout gather (chunks 1, keep_kv, pull)" in (pulls.made_here or "")
    ring = set_up(parse_config(write_run(tmp_path / "ring", plan={"layout": "ring"})))
    assert ring.plan.forward.value == Ring()


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "unknown key": ({"stepz": 3}, "config: stepz: unknown key"),
    "unknown inner key": ({"optimizer": {"lr": 1.0}}, "optimizer.lr"),
    "wrong type": ({"steps": "many"}, "steps: .*, not 'many'"),
    "no data folder": ({"data": {"folder": "/nowhere"}}, "/nowhere: is no data folder"),
    "no model": ({"model": {"path": "/nowhere"}}, "model.path: no such model configuration"),
    "weights missing": ({"model": {"random_weights": False}}, "holds no safetensors"),
    "too long": ({"seq_len_tokens": 100_000}, "tokens: holds 5608 tokens, a sequence has 100000"),
    "no plan": ({"plan": {"file": "/nowhere.json"}}, "/nowhere.json: cannot be read"),
    "selector": ({"plan": {"pattern": {"selector": "best"}}}, "plan.pattern: selector: 'best' is not one of"),
    "setting": ({"plan": {"pattern": {"selector": "flex", "settings": {"columns": 3}}}}, "flex has no such setting"),
    "layout's parameter": (
        {"plan": {"layout_parameters": {"prefetch": 2}}},
        "plan: prefetch: is no parameter of 'gather': it has chunks, keep_kv, pull, narrow_gradients",
    ),
    "layout's value": ({"plan": {"layout_parameters": {"pull": 2}}}, "plan: pull: is 2, not true or false"),
    "layout": ({"plan": {"layout": "spiral"}}, "plan: layout: 'spiral' is not one of gather, ring"),
    "parameter missing": ({"plan": {"layout": "two_level"}}, "plan: inner_size: is missing for 'two_level'"),
    "heads": (
        {"plan": {"layout": "ulysses", "layout_parameters": {"degree": 3}}},
        "plan.layout_parameters: forward: ulysses: 2 ranks are no groups of 3",
    ),
    "documents": (
        {"plan": {"pattern": {"selector": "shifted-groups"}}, "data": {"documents": {"attention": True}}},
        "data.documents.attention: 'shifted-groups' does not choose per document",
    ),
    "documents within blocks": (
        {"plan": {"pattern": {"selector": "flex"}}, "data": {"documents": {"attention": True}}},
        "data.documents.attention: 'flex' chooses for a document as if it were alone, which needs whole blocks of 64",
    ),
    "zigzag length": ({"attention": "dense-zigzag", "seq_len_tokens": 254}, "254 is no multiple of 4"),
    "patience": ({"timeout_s": 20, "patience_s": 30}, "patience_s 30 is not less than timeout_s 20"),
    "baseline with plan": ({"attention": "dense", "plan": {"file": "x"}}, "takes no plan"),
    "torch ring on CPU": ({"attention": "torch-context-parallel"}, "attention: 'torch-context-parallel' needs GPUs"),
    "flash4 ring on CPU": ({"attention": "dense-zigzag-flash4"}, "attention: 'dense-zigzag-flash4' needs GPUs"),
    "flash4 ring in float32": (
        {"attention": "dense-zigzag-flash4", "device": "cuda"},
        "attention: 'dense-zigzag-flash4' knows bfloat16 and float16, not torch.float32",
    ),
    "flash4 ring, small heads": (
        {"attention": "dense-zigzag-flash4", "device": "cuda", "dtype": "bfloat16"},
        r"attention: 'dense-zigzag-flash4' knows heads of \(64, 128\), not of 8",
    ),
    "rope": (
        {
            "model": {
                "rope_parameters": {
                    "rope_type": "longrope",
                    "factor": 2.0,
                    "rope_theta": 1e4,
                    "short_factor": [1.0] * 4,
                    "long_factor": [2.0] * 4,
                    "original_max_position_embeddings": 128,
                }
            }
        },
        "rope_parameters.rope_type: 'longrope' depends on the length a rank sees",
    ),
    "float16": ({"dtype": "float16"}, "'float16' cannot be trained in"),
    "liger on CPU": ({"memory": {"loss": "liger"}}, "memory.loss: needs a GPU"),
    "fused on CPU": ({"memory": {"fused_layers": True}}, "memory.fused_layers: needs a GPU"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_trained_is_one_line(name: str, tmp_path: Path) -> None:
    changes, message = REFUSED[name]
    raw = merged(write_run(tmp_path), changes)
    with pytest.raises(InputError, match=message) as caught:
        set_up(parse_config(raw))
    assert "\n" not in str(caught.value)


def test_the_flash4_ring_without_its_wheels_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = write_run(tmp_path, model={"head_dim": 64}, attention="dense-zigzag-flash4", dtype="bfloat16", device="cuda")
    flash4_launch.wheels.cache_clear()
    monkeypatch.setitem(sys.modules, "flash_attn.cute.interface", None)  # how Python says that an import must fail
    try:
        with pytest.raises(InputError, match=r"^attention: 'dense-zigzag-flash4': .*flash-attn-4") as caught:
            set_up(parse_config(raw))
    finally:
        flash4_launch.wheels.cache_clear()
    assert "\n" not in str(caught.value)


def test_the_flash4_ring_is_placed_like_the_other_dense_rings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparsering.kernels.flash4.launch.wheels", lambda: (object(), object()))
    common = {"model": {"head_dim": 64}, "dtype": "bfloat16", "device": "cuda"}
    plans = [
        set_up(parse_config(write_run(tmp_path, attention=attention, **common))).plan
        for attention in ("dense-zigzag", "dense-zigzag-flash4")
    ]
    assert plans[0].digest == plans[1].digest
    assert plans[1].placement.name == "zigzag"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seq_len_tokens": 200, "placement": striped(seq_len_tokens=200, world_size=2, granularity_tokens=64)},
         "seq_len_tokens: the plan is for 200, not for 256"),
        ({"placement": striped(seq_len_tokens=SEQ_LEN_TOKENS, world_size=4, granularity_tokens=64)},
         "world_size: the plan is for 4, not for 2"),
        ({"model": ModelShape(layers=3, heads=4, kv_heads=2, head_dim=8)}, "model: the plan is for"),
        ({"dtype": "bfloat16"}, "dtype: the plan is for bfloat16"),
        ({"pattern": PatternSpec(source="trace")}, "plan.trace: the plan replays a trace: give it"),
    ],
)  # fmt: skip
def test_a_plan_for_something_else_is_one_line(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        set_up(parse_config(write_run(tmp_path, plan={"file": _plan(tmp_path, **changes)})))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_dropout": 0.1}, "attention_dropout: is 0.1; dropout and noise are not supported"),
        ({"vocab_size": 100}, "vocabulary: has a vocabulary of 256, the model of 100"),
    ],
)
def test_a_model_that_would_be_trained_wrongly_is_refused(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        set_up(parse_config(write_run(tmp_path, model=MODEL | changes)))


def test_altered_data_is_refused(tmp_path: Path) -> None:
    config = parse_config(write_run(tmp_path))
    path = tmp_path / "data/tokens-00000.bin"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(InputError, match=r"tokens-00000.bin: sha256"):
        set_up(config)


def test_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    raw = write_run(tmp_path)
    raw["model"]["path"], raw["data"]["folder"] = "model", "data"
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(raw))
    assert set_up(load_config(tmp_path / "config.yaml")).config.model.path == tmp_path / "model"


def test_a_wrong_key_ends_both_ways_to_start_with_one_line(tmp_path: Path) -> None:
    write_run(tmp_path, stepz=3)
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")} | {"PYTHONSAFEPATH": "1"}
    path = str(tmp_path / "config.yaml")
    for arguments in (["sparsering.cli", "train", path, "--dry-run"], ["sparsering.runtime.train", path]):
        done = subprocess.run([sys.executable, "-m", *arguments], env=environment, capture_output=True, text=True)
        assert done.returncode == 2, done.stderr
        assert done.stderr.strip() == f"sparsering: {path}: stepz: unknown key (its value is 3); did you mean 'steps'?"
