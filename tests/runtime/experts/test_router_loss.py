"""Losses of routers over real gloo ranks: equal to the model alone, whose tokens they are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from model_cases import case_config, case_model
from rank_pool import RankPool
from sparsering.runtime.audit.audit import audit, require_model
from sparsering.runtime.audit.twins import MetAttention
from sparsering.runtime.train.config import parse_config
from sparsering.runtime.train.model import build_model, master_dtype, read_model_config
from sparsering.runtime.train.setup import set_up
from sparsering.traces.errors import InputError, UnsupportedError
from train_alone import pieces_of
from train_runs import write_run

Pools = Callable[[int], RankPool]
TOLERANCE = 1e-6
FLOAT32 = 1e-4
CASES = ("qwen3-moe-routers", "mixtral-routers", "gpt-oss-routers", "olmoe-routers")
COEFFICIENT = 0.7
EXPERTS = {"output_router_logits": True, "router_aux_loss_coef": COEFFICIENT, "num_experts_per_tok": 2}
NARROW = {"head_dim": 8, "architectures": None, "pad_token_id": 0, "sliding_window": None}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"num_experts": 6, "moe_intermediate_size": 32},
    "mixtral": {"num_local_experts": 4},
    "gpt_oss": {"num_local_experts": 4, "sliding_window": 64},
    "olmoe": {"num_experts": 4},
}


def _batches(count: int, *, rows: int = 1) -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    return [generator.integers(3, 256, (rows, 256)) for _ in range(count)]


def _assert_same_gradients(found: dict[str, Any], wanted: dict[str, np.ndarray], tolerance: float = TOLERANCE) -> None:
    largest = max(float(np.abs(gradient).max()) for gradient in wanted.values())
    for name, gradient in wanted.items():
        room = tolerance * max(float(np.abs(gradient).max()), 1e-4 * largest)
        np.testing.assert_allclose(found[name], gradient, rtol=0, atol=room, err_msg=name)


def _alone(name: str, batches: list[np.ndarray], *, weights: torch.dtype = torch.float64) -> dict[str, Any]:
    """weights: of what type they are drawn; computed is in float64."""
    model = case_model(name).train()
    model.load_state_dict(case_model(name, dtype=weights).state_dict())
    losses, aux = [], []
    for ids in batches:
        output: Any = model(input_ids=torch.from_numpy(ids), labels=torch.from_numpy(ids))
        output.loss.backward()
        losses.append(output.loss.item())
        aux.append(output.aux_loss.item())
    gradients = {name: p.grad.numpy() for name, p in model.named_parameters() if p.grad is not None}
    return {"losses": losses, "aux": aux, "gradients": gradients}


def _summed(results: list[dict[str, Any]]) -> dict[str, Any]:
    gradients = {name: sum(one["gradients"][name] for one in results) for name in results[0]["gradients"]}
    return {what: np.sum([one[what] for one in results], axis=0) for what in ("losses", "aux")} | {
        "gradients": gradients
    }  # fmt: skip


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("world_size", [2, 4])
def test_an_attached_model_equals_itself_alone(name: str, world_size: int, rank_pools: Pools) -> None:
    """Two batches, whose gradients are accumulated; layers are checkpointed on four ranks."""
    checkpointing = {"use_reentrant": False} if world_size == 4 else None
    job = {"name": name, "batches": _batches(2), "checkpointing": checkpointing}
    results = rank_pools(world_size).run("expert_jobs.attached_steps", **job)
    found, wanted = _summed(results), _alone(name, job["batches"])
    np.testing.assert_allclose(found["losses"], wanted["losses"], rtol=TOLERANCE)
    np.testing.assert_allclose(found["aux"], wanted["aux"], rtol=TOLERANCE)
    _assert_same_gradients(found["gradients"], wanted["gradients"])


@pytest.mark.parametrize("experts", ["grouped_mm", "batched_mm"])
@pytest.mark.parametrize("name", ["qwen3-moe-routers", "gpt-oss-routers"])
def test_products_of_experts_equal_a_loop_over_them(name: str, experts: str, rank_pools: Pools) -> None:
    """In float32, beside the model alone in float64 with the loop."""
    job = {"name": name, "batches": _batches(1), "experts": experts}
    found = _summed(rank_pools(2).run("expert_jobs.attached_steps", **job))
    wanted = _alone(name, job["batches"], weights=torch.float32)
    np.testing.assert_allclose(found["losses"], wanted["losses"], rtol=FLOAT32)
    _assert_same_gradients(found["gradients"], wanted["gradients"], FLOAT32)


def test_experts_from_elsewhere_are_refused() -> None:
    model = case_model("qwen3-moe")
    model.config._experts_implementation = "sonicmoe"
    with pytest.raises(UnsupportedError, match=r"^experts_implementation: is 'sonicmoe': nothing was proven about it"):
        require_model(model, seq_len_tokens=256)


def test_choices_of_one_rank_alone_would_be_another_loss(rank_pools: Pools) -> None:
    """The tests above can fail: what ranks without each other's counts add up to is not the loss."""
    job = {"name": CASES[0], "batches": _batches(1), "own_counts": True}
    found = _summed(rank_pools(2).run("expert_jobs.attached_steps", **job))
    wanted = _alone(CASES[0], job["batches"])
    assert abs(found["aux"][0] - wanted["aux"][0]) > 1e-3
    with pytest.raises(AssertionError):
        _assert_same_gradients(found["gradients"], wanted["gradients"])


def test_reentrant_checkpoints_are_refused(rank_pools: Pools) -> None:
    """They lose the gradients of everything but a layer's output, of the model alone too."""
    job = {"name": CASES[0], "batches": _batches(1), "checkpointing": {"use_reentrant": True}}
    for result in rank_pools(2).run("expert_jobs.attached_steps", **job):
        assert result["said"].startswith("output_router_logits: is on, but no gradient reaches the routers: checkpoint")


def test_the_audit_refuses_a_loss_of_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MetAttention, "total", lambda self, counts: counts)
    found = audit(case_config(CASES[0]), seq_len_tokens=256, cache=None)
    assert not found.right and "is off by" in f"{found.reason}"


def _run(folder: Path, family: str, **changes: Any) -> dict[str, Any]:
    model = NARROW | EXPERTS | {"model_type": family} | FAMILIES[family]
    one_step = {"steps": 1, "dtype": "float64", "optimizer": {"clip_norm": None, "warmup_steps": 2}}
    return write_run(folder, model=model, **(one_step | changes))


def _trained_alone(raw: dict[str, Any]) -> dict[str, Any]:
    """One process: the mean token loss of the step, and the routers' loss of each microbatch, as the model has it."""
    config = parse_config(raw)
    model, drawn = (
        build_model(config.model, read_model_config(config.model), device=torch.device("cpu"), dtype=dtype,
                    seed=config.seed)
        for dtype in (torch.float64, master_dtype(config))
    )  # fmt: skip
    model.load_state_dict(drawn.state_dict())
    model.set_attn_implementation("eager")
    replicas, aux, losses = config.parallel.data, [], []
    for number in range(config.microbatches):
        slots = range(number * replicas, (number + 1) * replicas)
        batch = torch.stack([pieces_of(config, 0, slot, per_document=False)[0] for slot in slots])
        output = model(input_ids=batch, use_cache=False)
        aux.append(output.aux_loss)
        losses.append(torch.nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten()))
    loss, router_loss = torch.stack(losses).mean(), torch.stack(aux).mean()
    (loss + COEFFICIENT * router_loss).backward()
    gradients = {name: p.grad.numpy() for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.item(), "router_loss": router_loss.item(), "gradients": gradients}


TWO_BY_TWO = {"parallel": {"data": 2, "context": 2}, "microbatches": 2}


@pytest.mark.slow
def test_training_by_grouped_products(tmp_path: Path, rank_pools: Pools) -> None:
    """What transformers takes by default below float64, beside one process that loops over experts in float64."""
    config = _run(tmp_path, "qwen3_moe", dtype="float32")
    wanted = _trained_alone(config)
    for result in rank_pools(2).run("expert_jobs.trained_gradients", config=config):
        assert result["experts"] == "grouped_mm"
        assert result["loss"] == pytest.approx(wanted["loss"], rel=FLOAT32)
        _assert_same_gradients(result["gradients"], wanted["gradients"], FLOAT32)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "ranks", "changes"),
    [
        ("qwen3_moe", 2, {"seq_len_tokens": 200, "memory": {"checkpoint_layers": False}}),  # the last stripe is padded
        ("mixtral", 4, {"parallel": {"data": 1, "context": 4}, "memory": {"whole_layers": 1}}),
        ("olmoe", 4, {"parallel": {"data": 4, "context": 1}}),
        *((family, 4, TWO_BY_TWO) for family in FAMILIES),
    ],
)
def test_training_equals_one_process(
    family: str, ranks: int, changes: dict[str, Any], tmp_path: Path, rank_pools: Pools
) -> None:
    config = _run(tmp_path, family, **changes)
    wanted = _trained_alone(config)
    for result in rank_pools(ranks).run("expert_jobs.trained_gradients", config=config):
        assert result["loss"] == pytest.approx(wanted["loss"], rel=TOLERANCE)
        assert result["router_loss"] == pytest.approx(wanted["router_loss"], rel=TOLERANCE)
        assert result["values"]["router_loss"] == result["router_loss"]
        _assert_same_gradients(result["gradients"], wanted["gradients"])


def test_pieces_of_a_router_are_refused(tmp_path: Path) -> None:
    config = parse_config(_run(tmp_path, "mixtral", memory={"mlp_tiles": 2}))
    with pytest.raises(InputError, match=r"^memory\.mlp_tiles and output_router_logits: are on: "):
        set_up(config)
