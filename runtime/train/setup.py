"""Everything about a training run that can be known, and refused, before any GPU work.

Nothing here joins other processes or touches a device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ...planner.cost.memory import layer_memory
from ...planner.plan import ELEMENT_BYTES, Plan
from ...planner.schedule.schedule import DIRECTIONS
from ...traces.errors import InputError
from ..audit.audit import audit
from ..audit.result import Audit
from ..data.shards import TokenData
from ..hf.attach import check_padding
from ..model.losses import liger_is_here
from .checkpoint import newest_checkpoint, read_checkpoint_manifest
from .config import TrainConfig
from .facts import ModelFacts, model_facts
from .metrics import TensorBoard
from .model import read_model_config
from .plan import ResolvedPlan, resolve_plan

MASTER_BYTES = 4


@dataclass(frozen=True, kw_only=True)
class Setup:
    """A checked run. model_config: transformers'; audited: what the audit of it said."""

    config: TrainConfig
    device: str
    model_config: Any
    audited: Audit
    facts: ModelFacts
    resolved: ResolvedPlan
    data: TokenData

    @property
    def plan(self) -> Plan:
        """The plan that attention follows."""
        return self.resolved.plan

    def run_facts(self) -> dict[str, Any]:
        """Return what makes two runs the same run: it stands in checkpoints."""
        config = self.config
        return {
            "model_type": self.facts.model_type,
            "parameters": self.facts.parameters,
            "shape": self.facts.shape.model_dump(),
            "world_size": config.parallel.world_size,
            "plan_digest": self.plan.digest,
            "data_digest": self.data.manifest.digest,
            "seed": config.seed,
            "seq_len_tokens": config.seq_len_tokens,
            "sequences_per_step": config.sequences_per_step,
            "dtype": config.dtype,
        }

    def summary(self) -> dict[str, Any]:
        """Return what `--dry-run` shows."""
        memory = memory_estimate(self.config, self.facts, self.plan)
        return {
            "configuration": self.config.model_dump(mode="json"),
            "model": {
                "type": self.facts.model_type,
                "parameters": self.facts.parameters,
                "audit": {"right": self.audited.right, "errors": self.audited.errors, "digest": self.audited.digest},
            },
            "device": self.device,
            "plan_digest": self.plan.digest,
            "plan": self.resolved.made_here or str(self.config.plan.file),
            "sequences": self.data.sequences(self.config.seq_len_tokens),
            "tokens_per_step": self.config.sequences_per_step * self.config.seq_len_tokens,
            "memory_bytes_per_rank": memory,
        }


def set_up(config: TrainConfig, *, verify_data: bool = True) -> Setup:
    """Check a run and return it. verify_data: read every byte of the data and compare digests.

    Raises InputError, in one line, for whatever would stop the run later.
    """
    device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    model_config = read_model_config(config.model)
    audited = audit(model_config, seq_len_tokens=config.seq_len_tokens)
    audited.require(source=config.model.path)
    facts = model_facts(model_config)
    data = TokenData.open(config.data.folder)
    if data.manifest.vocabulary > facts.vocabulary:
        raise InputError(f"has a vocabulary of {data.manifest.vocabulary}, the model of {facts.vocabulary}",
                         source=config.data.folder, field="vocabulary")  # fmt: skip
    data.sequences(config.seq_len_tokens)
    if verify_data:
        data.verify()
    resolved = resolve_plan(config, facts.shape, device=device)
    check_padding(model_config, resolved.plan)
    for field, wanted in (("loss", config.memory.loss == "liger"), ("fused_layers", config.memory.fused_layers)):
        if wanted and (device != "cuda" or not liger_is_here()):
            raise InputError("needs a GPU and the package liger-kernel", field=f"memory.{field}")
    if config.metrics is not None and config.metrics.tensorboard:
        TensorBoard.require()
    setup = Setup(
        config=config, device=device, model_config=model_config, audited=audited, facts=facts, resolved=resolved,
        data=data,
    )  # fmt: skip
    _check_resume(setup)
    return setup


def _check_resume(setup: Setup) -> None:
    section = setup.config.checkpoint
    found = newest_checkpoint(section.folder) if section is not None and section.resume else None
    if found is not None:
        check_facts(read_checkpoint_manifest(found)["facts"], setup.run_facts(), source=str(found))


def check_facts(saved: dict[str, Any], run: dict[str, Any], *, source: str) -> None:
    """Refuse to go on from a checkpoint of another run: InputError names what differs."""
    for name, value in run.items():
        if saved.get(name) != value:
            raise InputError(f"the checkpoint has {saved.get(name)!r}, the run {value!r}: train into another folder, "
                             "or export the checkpoint and start from it", source=source, field=name)  # fmt: skip


def memory_estimate(config: TrainConfig, facts: ModelFacts, plan: Plan) -> dict[str, int]:
    """Return bytes by purpose on one rank at the peak of a step, and their "total". An estimate: allocators differ."""
    shape, world = plan.attention_shape(), config.parallel.world_size
    element, tokens = ELEMENT_BYTES[config.dtype], shape.tokens_per_rank
    master = 8 if config.dtype == "float64" else MASTER_BYTES
    root = facts.parameters - facts.shape.layers * facts.layer_parameters
    row = tokens * facts.hidden * element
    queries = tokens * shape.heads * shape.head_dim * element
    keys = 2 * tokens * shape.kv_heads * shape.head_dim * element
    kept = row + queries + tokens * shape.heads * shape.accumulator_bytes
    kept += 2 * plan.columns_capacity * shape.heads * shape.head_dim * element
    kept_kv = plan.schedule("forward").kept_bytes
    kept += kept_kv
    layer = kept_kv + 6 * row + 2 * queries + keys + 4 * tokens * facts.intermediate * element
    layers = facts.shape.layers
    whole = min(config.memory.whole_layers, layers) if config.memory.checkpoint_layers else layers
    backend = plan.kernels.backend
    reordered = plan.head_orders is not None
    memories = [layer_memory(plan.schedule(d), shape, backend=backend, reordered=reordered) for d in DIRECTIONS]
    attention = max(memory.total_bytes for memory in memories)
    chunk = min(config.memory.loss_chunk_tokens, tokens) * facts.vocabulary * (2 * master + 2 * element)
    parts = {
        "parameters": master * facts.parameters // world,
        "gradients": master * facts.parameters // world,
        "optimizer": 2 * master * facts.parameters // world,
        "gathered_parameters": element * (2 * facts.layer_parameters + 2 * root) + master * facts.layer_parameters,
        "kept_for_backward": 0 if config.memory.offload else (layers - whole) * kept,
        "whole_layers": max(whole, 1) * layer,
        "attention": attention,
        "loss": chunk + master * facts.vocabulary * facts.hidden + row,
    }
    return parts | {"total": sum(parts.values())}
