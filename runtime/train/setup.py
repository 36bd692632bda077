"""Everything about a training run that can be known, and refused, before any GPU work.

Nothing here joins other processes or touches a device.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...planner.cost.memory import layer_memory
from ...planner.plan import Plan
from ...planner.schedule.schedule import DIRECTIONS
from ...planner.specs import ELEMENT_BYTES
from ...traces.dataset.store import Trace
from ...traces.errors import InputError
from ..audit.audit import audit
from ..audit.result import Audit
from ..data.shards import TokenData
from ..hf.attach import check_padding
from ..model.losses import liger_is_here
from .checkpoint import newest_checkpoint, read_checkpoint_manifest
from .config import TrainConfig
from .model import ModelFacts, master_dtype, model_facts, read_model_config
from .plan import resolve_plan


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
        } | {name: getattr(self.config, name) for name in own}

    def check_resumed(self, saved: dict[str, Any], *, source: Path) -> None:
        """Refuse to go on from a checkpoint of another run, whose facts are `saved`: InputError names what differs."""
        for name, value in self.run_facts().items():
            if saved.get(name) != value:
                told = f"the checkpoint has {saved.get(name)!r}, the run {value!r}: train into another folder, "
                raise InputError(f"{told}or export the checkpoint and start from it", source=source, field=name)

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
            "tokens_per_step": self.config.sequences_per_step * self.config.seq_len_tokens,
            "memory_bytes_per_rank": self.memory_bytes(),
        }

    def memory_bytes(self) -> dict[str, int]:
        """Estimate bytes by purpose on one rank at the peak of a step, and their "total": allocators differ."""
        model, facts, plan, memory = self.model_config, self.facts, self.plan, self.config.memory
        shape, world, layers = plan.attention_shape(), self.config.parallel.world_size, facts.shape.layers
        element, tokens = ELEMENT_BYTES[self.config.dtype], shape.tokens_per_rank
        master = master_dtype(self.config).itemsize
        intermediate = getattr(model, "intermediate_size", None) or 4 * model.hidden_size
        root = facts.parameters - layers * facts.layer_parameters
        row = tokens * model.hidden_size * element
        queries = tokens * shape.heads * shape.head_dim * element
        keys = 2 * tokens * shape.kv_heads * shape.head_dim * element
        kept_kv = plan.schedule("forward").kept_bytes
        kept = row + queries + tokens * shape.heads * shape.accumulator_bytes + kept_kv
        kept += 2 * plan.columns_capacity * shape.heads * shape.head_dim * element
        layer = kept_kv + 6 * row + 2 * queries + keys + 4 * tokens * intermediate * element
        whole = min(memory.whole_layers, layers) if memory.checkpoint_layers else layers
        backend, reordered = plan.kernels.backend, plan.head_orders is not None
        attention = [layer_memory(plan.schedule(d), shape, backend=backend, reordered=reordered) for d in DIRECTIONS]
        chunk = min(memory.loss_chunk_tokens, tokens) * model.vocab_size * (2 * master + 2 * element)
        parts = {
            "parameters": master * facts.parameters // world,
            "gradients": master * facts.parameters // world,
            "optimizer": 2 * master * facts.parameters // world,
            "gathered_parameters": element * (2 * facts.layer_parameters + 2 * root) + master * facts.layer_parameters,
            "kept_for_backward": 0 if memory.offload else (layers - whole) * kept,
            "whole_layers": max(whole, 1) * layer,
            "attention": max(one.total_bytes for one in attention),
            "loss": chunk + master * model.vocab_size * model.hidden_size + row,
        }
        return parts | {"total": sum(parts.values())}


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
    plan, trace, made_here = resolve_plan(config, facts.shape, device=device)
    check_padding(model_config, plan)
    for field, wanted in (("loss", config.memory.loss == "liger"), ("fused_layers", config.memory.fused_layers)):
        if wanted and (device != "cuda" or not liger_is_here()):
            raise InputError("needs a GPU and the package liger-kernel", field=f"memory.{field}")
    if config.metrics is not None and config.metrics.tensorboard:
        try:
            from torch.utils.tensorboard import SummaryWriter  # noqa: F401
        except ImportError as error:
            raise InputError("needs the package tensorboard: pip install 'sparsering[tensorboard]'",
                             field="metrics.tensorboard") from error  # fmt: skip
    setup = Setup(
        config=config, device=device, model_config=model_config, audited=audited, facts=facts, plan=plan, trace=trace,
        made_here=made_here, data=data,
    )  # fmt: skip
    newest = newest_checkpoint(config.checkpoint.folder) if config.checkpoint and config.checkpoint.resume else None
    if newest is not None:
        setup.check_resumed(read_checkpoint_manifest(newest)["facts"], source=newest)
    return setup
