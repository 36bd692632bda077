"""Everything about a training run that can be known, and refused, before any GPU work.

Nothing here joins other processes or touches a device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ...planner.plan import Plan
from ...traces.errors import InputError
from ..audit.audit import Audit, audit
from ..data.shards import TokenData
from ..hf.attach import check_padding
from ..model.losses import liger_is_here
from .checkpoint import newest_checkpoint, read_checkpoint_manifest
from .config import TrainConfig
from .estimate import memory_estimate
from .metrics import TensorBoard
from .model import ModelFacts, model_facts, read_model_config
from .plan import ResolvedPlan, resolve_plan


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
