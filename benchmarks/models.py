"""Which families of transformers are right over several ranks: the audit of every causal language model it has.

Each family is audited in the form in which it is one (`lib/families.py`), at --seq-len tokens (fewer where it has fewer
positions), and again at the length of its window where that is what refuses it. With --gloo, what the audit calls right
is also run: the small copy attached to a plan over two gloo processes, in float64, against the small copy alone.
    python -m sparsering.benchmarks.models --gloo --page docs/models.md
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ..runtime.audit.audit import audit, small_model
from ..runtime.audit.proof import AUDITED_TOKENS, RANKS, Run, audited_plan, compare, random_batch, run_alone
from ..runtime.audit.twins import Double
from ..runtime.comm.mesh import Mesh, inherited_environment, is_rank, join, leave
from ..runtime.comm.start import start_ranks
from ..runtime.hf.attach import attach
from ..runtime.model.calls.asked import KEYS_OF_A_QUERY
from ..runtime.model.shape import model_shape
from ..runtime.model.shard import shard
from ..traces.errors import InputError
from .lib.common import ResultFile
from .lib.families import audited_tokens, causal_form, not_causal_without_state
from .lib.models_page import write_page

KEPT = ("model_class", "seq_len_tokens", "right", "about", "reason", "layers", "parameters", "seconds")
WINDOWS = ("sliding_window", "attention_chunk_size", "sliding_window_size", "window_size", "local_attention")


def main() -> int:
    """Audit all families and write one row each."""
    arguments = _parser().parse_args()
    if arguments.gloo and not is_rank():
        environment = inherited_environment(world_size=RANKS) | {"OMP_NUM_THREADS": "1"}
        return start_ranks(sys.argv[1:], world_size=RANKS, environment=environment, module=__spec__.name)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    mesh = join(device="cpu") if is_rank() else None
    first, result = mesh is None or mesh.rank == 0, ResultFile("models")
    result.write_as_they_come(_rows(arguments, mesh), _line, first_rank=first)
    if first:
        print(result.path)
        if arguments.page is not None:
            write_page(result.path, arguments.page)
    leave()
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="*", default=list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES), help="model types")
    parser.add_argument("--seq-len", type=int, default=1024, help="tokens of the sequences that would be split")
    parser.add_argument("--gloo", action="store_true", help="also attach what is right on two gloo processes")
    parser.add_argument("--page", type=Path, help="Markdown page to write the table into")
    return parser


def _rows(arguments: argparse.Namespace, mesh: Mesh | None) -> Iterator[dict[str, Any]]:
    """Yield a row a family, in order. Ranks audit a family each at a time, and attach together what is right."""
    ranks = 1 if mesh is None else mesh.world_size
    for first in range(0, len(arguments.families), ranks):
        some = arguments.families[first : first + ranks]
        own = [_row(family, arguments.seq_len) for family in some[0 if mesh is None else mesh.rank :][:1]]
        for number, row in enumerate(own if mesh is None else _told(mesh, own, len(some))):
            if row["right"] and mesh is not None:
                config, model_class, _ = causal_form(some[number])
                row |= _verified(config, model_class, mesh)
            yield row


def _told(mesh: Mesh, own: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """Return the rows of the first `count` ranks; own: this rank's, where it has one. Collective."""
    everyone: list[Any] = [None] * mesh.world_size
    dist.all_gather_object(everyone, own)
    return [rows[0] for rows in everyone[:count]]


def _row(family: str, seq_len: int) -> dict[str, Any]:
    row: dict[str, Any] = {"family": family}
    try:
        config, model_class, audited_as = causal_form(family)
    except Exception as error:  # some configurations cannot be made from their defaults; the row says so
        return row | {"right": False, "about": "configuration", "reason": f"{type(error).__name__}: {error}"}
    row |= {"audited_as": audited_as}
    tokens = audited_tokens(config, seq_len)
    found = audit(config, seq_len_tokens=tokens, model_class=model_class, cache=None)
    errors = {f"{road}_{kind}_error": error for road, all in found.errors.items() for kind, error in all.items()}
    row |= {name: getattr(found, name) for name in KEPT} | errors
    limits = [limit for name in KEYS_OF_A_QUERY if type(limit := getattr(config, name, None)) is int]
    if found.right:
        return row | ({"right_up_to_tokens": min(limits)} if limits else {})
    window = min((w for name in WINDOWS if type(w := getattr(config, name, None)) is int and w > 64), default=None)
    if found.about in WINDOWS and window is not None:
        shorter = audit(config, seq_len_tokens=window, model_class=model_class, cache=None)
        row |= {"right_up_to_tokens": window if shorter.right else None, "reason_at_window": shorter.reason}
    return row | {"group": not_causal_without_state(config, model_class, seq_len)}


def _verified(config: Any, model_class: type[PreTrainedModel], mesh: Mesh) -> dict[str, Any]:
    """Attach the small copy on both ranks and return how far loss and gradients are from the copy alone."""
    began = time.perf_counter()
    model = small_model(config, model_class, AUDITED_TOKENS).train()
    batch = random_batch(model, seed=3)
    alone = run_alone(copy.deepcopy(model), batch)
    plan = audited_plan(model_shape(model.config))
    attached = attach(model, plan, mesh)
    with Double():
        loss = model(**shard(batch, plan, mesh.rank)).loss
        loss.backward()
    attached.detach()
    total = loss.detach().clone()
    dist.all_reduce(total)
    errors = compare(Run(loss=float(total), logits=None, gradients=_summed_gradients(model)), alone)
    seconds = round(time.perf_counter() - began, 3)
    return {"gloo_loss_error": errors.loss, "gloo_gradient_error": errors.gradient, "gloo_seconds": seconds}


def _summed_gradients(model: PreTrainedModel) -> dict[str, Tensor | None]:
    summed: dict[str, Tensor | None] = {}
    for name, parameter in model.named_parameters():
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        dist.all_reduce(gradient)
        summed[name] = gradient
    return summed


def _line(row: dict[str, Any]) -> str:
    if not row["right"]:
        return f"{row['family']:24} refused  {row['about']}: {row['reason']}"[:200]
    gloo = f", two gloo ranks {row['gloo_gradient_error']:.0e}" if "gloo_gradient_error" in row else ""
    return f"{row['family']:24} right    {row['train_gradient_error']:.0e}{gloo}  ({row['seconds']:.1f} s)"


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except InputError as error:
        print(f"models: {error}", file=sys.stderr)
        raise SystemExit(2) from error
