"""Everything about a training run that can be known, and refused, before any GPU work.

Nothing here joins other processes or touches a device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ...planner.plan import Plan
from ...traces.dataset.store import Trace
from ...traces.errors import InputError, shown
from ..attention.here import require_backend_here
from ..audit.audit import audit, causal_class, small_model
from ..audit.result import Audit
from ..data.shards import TokenData
from ..experts.load import require_experts
from ..hf.attach import check_padding
from ..model.layers.tiled_mlp import require_tileable
from ..model.losses import liger_is_here
from ..model.shape import ROUTER_LOGITS, decoder_layers, setting
from .checkpoint import newest_checkpoint, read_checkpoint_manifest
from .config import ChooseSection, TrainConfig
from .estimate.memory import memory_bytes
from .model import ModelFacts, model_facts, read_model_config
from .plan import resolve_plan
from .writers.opened import require_packages


@dataclass(frozen=True, kw_only=True)
class Setup:
    """A checked run.

    model_config: transformers'; audited: what the audit of it said; trace: what the plan replays, if it does;
    made_here: one line about a plan that no file gave.
    """

    config: TrainConfig
    device: str
    model_config: Any
    audited: Audit
    facts: ModelFacts
    plan: Plan
    trace: Trace | None
    made_here: str | None
    data: TokenData

    def run_facts(self) -> dict[str, Any]:
        """Return what makes two runs the same run: it stands in checkpoints."""
        own = ("seed", "seq_len_tokens", "sequences_per_step", "dtype")
        return {
            "model_type": self.model_config.model_type,
            "parameters": self.facts.parameters,
            "shape": self.facts.shape.model_dump(),
            "world_size": self.config.parallel.world_size,
            "plan_digest": self.plan.digest,
            "data_digest": self.data.manifest.digest,
            "choose": self.config.plan.choose.model_dump(),
        } | {name: getattr(self.config, name) for name in own}

    def check_resumed(self, manifest: dict[str, Any], *, source: Path) -> None:
        """Refuse to go on from a checkpoint of another run, or where its patterns would be needed: it holds none.

        manifest: the checkpoint's. InputError names what differs.
        """
        # Those of before something was a setting did what is its default.
        saved, choose = dict(manifest["facts"]), self.config.plan.choose
        saved["choose"] = ChooseSection().model_dump() | saved.get("choose", {})
        for name, value in self.run_facts().items():
            if saved.get(name) != value:
                told = f"the checkpoint has {shown(saved.get(name))}, the run {value!r}: train into another folder, "
                raise InputError(f"{told}or export the checkpoint and start from it", source=source, field=name)
        step = manifest["step"]
        if step < self.config.steps and not choose.chooses_at(step):
            told = f"step {step} uses the patterns of step {choose.chosen_in(step)}, which no checkpoint holds: a run "
            raise InputError(f"{told}cannot go on there", source=source, field="plan.choose")

    def summary(self) -> dict[str, Any]:
        """Return what `--dry-run` shows."""
        return {
            "configuration": self.config.model_dump(mode="json"),
            "model": {
                "type": self.model_config.model_type,
                "parameters": self.facts.parameters,
                "audit": {"right": self.audited.right, "errors": self.audited.errors, "digest": self.audited.digest},
            },
            "device": self.device,
            "plan_digest": self.plan.digest,
            "plan": self.made_here or str(self.config.plan.file),
            "sequences": self.data.sequences(self.config.seq_len_tokens),
            "choosing_steps": self._choosing_steps(),
            "dense_steps": self.config.plan.choose.dense_steps(self.config.steps),
            "tokens_per_step": self.config.sequences_per_step * self.config.seq_len_tokens,
            "memory_bytes_per_rank": memory_bytes(self.config, self.model_config, self.facts, self.plan),
        }

    def _choosing_steps(self) -> int:
        """Return in how many steps patterns are chosen."""
        chooses = self.config.attention == "planned" and self.plan.pattern.source == "choose"
        return self.config.plan.choose.choosing_steps(self.config.steps) if chooses else 0


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
    if data.manifest.vocabulary > model_config.vocab_size:
        raise InputError(f"has a vocabulary of {data.manifest.vocabulary}, the model of {model_config.vocab_size}",
                         source=config.data.folder, field="vocabulary")  # fmt: skip
    data.sequences(config.seq_len_tokens)
    if verify_data:
        data.verify()
    plan, trace, made_here = resolve_plan(config, facts.shape, device=device, data=data)
    if config.attention == "planned":
        require_backend_here(plan.kernels.backend, device=device, source=config.plan.file)
    check_padding(model_config, plan)
    for field, wanted in (("loss", config.memory.loss == "liger"), ("fused_layers", config.memory.fused_layers)):
        if wanted and (device != "cuda" or not liger_is_here()):
            raise InputError("needs a GPU and the package liger-kernel", field=f"memory.{field}")
    counts_experts = config.metrics is not None and config.metrics.expert_load
    if config.memory.mlp_tiles > 1 or counts_experts:
        small = small_model(model_config, causal_class(model_config), config.seq_len_tokens)
        if counts_experts:
            require_experts(small)
        if config.memory.mlp_tiles > 1:
            _require_tileable(small, counted=[ROUTER_LOGITS] * bool(setting(model_config, ROUTER_LOGITS))
                              + ["metrics.expert_load"] * counts_experts)  # fmt: skip
    if config.metrics is not None:
        require_packages(config.metrics)
    setup = Setup(
        config=config, device=device, model_config=model_config, audited=audited, facts=facts, plan=plan, trace=trace,
        made_here=made_here, data=data,
    )  # fmt: skip
    newest = newest_checkpoint(config.checkpoint.folder) if config.checkpoint and config.checkpoint.resume else None
    if newest is not None:
        setup.check_resumed(read_checkpoint_manifest(newest), source=newest)
    return setup


def _require_tileable(small: PreTrainedModel, *, counted: Sequence[str]) -> None:
    """Refuse MLPs that cannot be computed in pieces. counted: settings that have tokens' choices of experts counted."""
    if counted:
        raise InputError("are on: experts that are called piece by piece are not counted right; leave one of them out",
                         field=f"memory.mlp_tiles and {counted[0]}")  # fmt: skip
    for layer in decoder_layers(small):
        require_tileable(layer)
