"""The demo's model: Qwen2's architecture in small, trained for a minute on the standard library's sources.

It need not write good Python. It must attend like a model that learned something: to sinks, to what is near, to where
the same text stood before; a model with random weights attends to everything alike.

Shape legend: B sequences, S tokens.
"""

from __future__ import annotations

import math
import sysconfig
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from ...traces.errors import InputError
from ...traces.progress import Progress

MODEL_ID = "demo-qwen2-byte"
HIDDEN = 128
STEPS = 400
SEQUENCES = 2
TRAINING_SEQ_LEN = 384
PEAK_LEARNING_RATE = 3e-3
WARMUP_STEPS = 10
TRIAL_STEPS = 4
MOST_BYTES_OF_A_FILE = 24_576
SKIPPED_FOLDERS = frozenset({"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"})


def standard_library_bytes(*, at_least_bytes: int, folder: Path | None = None) -> bytes:
    """Return at least so many bytes of the standard library's sources, the folder by default this Python's own.

    Files are taken in the order of their names, the large ones first cut off: no file dominates, and the same Python
    gives the same text. Raises InputError when there is less: some distributions come without sources.
    """
    root = folder or Path(sysconfig.get_paths()["stdlib"])
    parts: list[bytes] = []
    found = 0
    for path in sorted(root.rglob("*.py")):
        if SKIPPED_FOLDERS.intersection(path.relative_to(root).parts):
            continue
        try:
            parts.append(path.read_bytes()[:MOST_BYTES_OF_A_FILE])
        except OSError:
            continue
        found += len(parts[-1]) + 1
        if found >= at_least_bytes:
            return b"\n".join(parts)
    raise InputError(f"holds {found} bytes of Python sources, {at_least_bytes} are needed", source=root)


def make_model(*, seed: int, seq_len_tokens: int) -> PreTrainedModel:
    """Return the model with fresh weights, in float32. Bytes are its tokens."""
    settings: dict[str, Any] = {
        "vocab_size": 256, "hidden_size": HIDDEN, "intermediate_size": 2 * HIDDEN, "head_dim": 64,
        "num_hidden_layers": 4, "num_attention_heads": 6, "num_key_value_heads": 2,
        # Qwen2's own 0.02 is for wide models; with it so small a one attends to everything alike for long.
        "initializer_range": HIDDEN**-0.5,
        "max_position_embeddings": seq_len_tokens, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        "tie_word_embeddings": True, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None,
    }  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen2ForCausalLM(Qwen2Config(**settings))


def train(model: PreTrainedModel, tokens: Tensor, *, seconds: float, seed: int, progress: Progress) -> dict[str, Any]:
    """Train in place with AdamW on random windows of `tokens` (int64 [any]); seeded, but for where time ends it.

    seconds: stop after that many, though not all steps are done (slow machines). Returns plain values; losses are
    natural log per byte, of the first step and the mean of the last ten.
    """
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LEARNING_RATE, betas=(0.9, 0.98))
    model.train()
    places = torch.arange(TRAINING_SEQ_LEN + 1)
    losses: list[float] = []
    began = time.monotonic()
    with _threads_by_trial() as pick_threads:
        for step in range(STEPS):
            pick_threads(step)
            # The learning rate: a linear warm-up, then a cosine over steps or time.
            done = min(1.0, max(step / STEPS, (time.monotonic() - began) / seconds))
            share = min(1.0, (step + 1) / WARMUP_STEPS) * max(0.02, 0.5 * (1.0 + math.cos(math.pi * done)))
            for group in optimizer.param_groups:
                group["lr"] = PEAK_LEARNING_RATE * share
            starts = torch.randint(tokens.numel() - places.numel(), (SEQUENCES, 1), generator=generator)
            losses.append(_train_step(model, optimizer, tokens[starts + places]))
            progress(f"loss {losses[-1]:.2f}", step + 1, STEPS)
            if time.monotonic() - began > seconds:
                break
    model.eval()
    last = losses[-10:]
    return {
        "steps": len(losses),
        "seconds": time.monotonic() - began,
        "first_loss": losses[0],
        "last_loss": sum(last) / len(last),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }


@contextmanager
def _threads_by_trial() -> Iterator[Callable[[int], None]]:
    """Yield what is called before every step: it tries all threads, then one, and keeps what was quicker.

    On cores that are busy with other work, one thread may be many times quicker than threads that wait for each other.
    """
    most = torch.get_num_threads()
    started: dict[int, float] = {}

    def before(step: int) -> None:
        if step > 2 * TRIAL_STEPS:
            return
        started[step] = time.monotonic()
        if step == TRIAL_STEPS:
            torch.set_num_threads(1)
        if step == 2 * TRIAL_STEPS:
            # The first step of either trial warms up and is left out.
            together = started[TRIAL_STEPS] - started[1]
            alone = started[2 * TRIAL_STEPS] - started[TRIAL_STEPS + 1]
            torch.set_num_threads(most if together < alone else 1)

    try:
        yield before
    finally:
        torch.set_num_threads(most)


def _train_step(model: PreTrainedModel, optimizer: torch.optim.Optimizer, windows: Tensor) -> float:
    """Do one step on int64 [B, S + 1] of consecutive tokens and return its loss."""
    logits = model(input_ids=windows[:, :-1], use_cache=False).logits
    loss = cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss.item()
