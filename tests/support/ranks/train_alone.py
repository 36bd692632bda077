"""The same training by plain PyTorch, in one process: what runs over ranks are held to."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from sparsering.runtime.data.shards import TokenData
from sparsering.runtime.train.config import TrainConfig, parse_config
from sparsering.runtime.train.model import build_model, read_model_config
from sparsering.runtime.train.optimizer import learning_rate

TOLERANCE = 1e-5
# The gradient of a key bias is zero but for rounding (softmax does not see it), and AdamW makes any gradient a step.
ROUNDING_ONLY = "k_proj.bias"


def trained_alone(raw: dict[str, Any], *, per_document: bool = False) -> dict[str, Any]:
    """Train by the book: one process, eager attention, whole sequences (or documents), AdamW, clipping."""
    config = parse_config(raw)
    section = config.optimizer
    model_config = read_model_config(config.model)
    model = build_model(config.model, model_config, device=torch.device("cpu"), dtype=torch.float32, seed=config.seed)
    model.set_attn_implementation("eager")
    decayed = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": section.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=section.betas, eps=section.epsilon)
    losses, norms = [], []
    for step in range(config.steps):
        slots = range(config.sequences_per_step)
        pieces = [piece for slot in slots for piece in pieces_of(config, step, slot, per_document)]
        count = sum(piece.numel() - 1 for piece in pieces)
        total = 0.0
        for piece in pieces:
            logits = model(input_ids=piece[None], use_cache=False).logits[0, :-1]
            loss = F.cross_entropy(logits, piece[1:], reduction="sum") / count
            loss.backward()
            total += loss.item()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), section.clip_norm or 1e9).item())
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, section, config.steps)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    parameters = {name: p.detach().numpy() for name, p in model.named_parameters()}
    return {"losses": losses, "norms": norms, "parameters": parameters}


def pieces_of(config: TrainConfig, step: int, slot: int, per_document: bool) -> list[torch.Tensor]:
    data = TokenData.open(config.data.folder)
    sequence = data.at_step(
        step, slot, slots=config.sequences_per_step, seq_len_tokens=config.seq_len_tokens, seed=config.seed
    )
    tokens = torch.from_numpy(sequence.tokens)
    if not per_document:
        return [tokens]
    pieces = [tokens[torch.from_numpy(sequence.documents) == d] for d in range(sequence.documents[-1] + 1)]
    return [piece for piece in pieces if piece.numel() > 1]


def assert_same_training(results: list[dict[str, Any]], alone: dict[str, Any]) -> None:
    for result in results:
        np.testing.assert_allclose(result["losses"], alone["losses"], rtol=0, atol=TOLERANCE)
        np.testing.assert_allclose(result["norms"], alone["norms"], rtol=1e-4)
        for name, value in alone["parameters"].items():
            if not name.endswith(ROUNDING_ONLY):
                np.testing.assert_allclose(result["parameters"][name], value, rtol=0, atol=TOLERANCE, err_msg=name)
