"""Whether a rank's shard of a sequence, as the model was given it, is what the sequence and the plan say.

Shape legend: S tokens of the sequence, S_own of this rank's shard.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ....planner.plan import Plan
from ...data.shards import TokenSequence
from ...model.shard import IGNORED_LABEL
from ..batch import Microbatch
from ..config import DocumentsSection
from .states import number_of

QUANTITIES = ("tokens", "labels", "positions", "documents")


def wrong_inputs(
    batch: Microbatch, sequence: TokenSequence, plan: Plan, documents: DocumentsSection, *, rank: int
) -> list[str]:
    """Return which of QUANTITIES of a rank's shard differ from the definition. Waits for the device."""
    own = plan.make_placement().positions(rank)
    valid = own < plan.seq_len_tokens
    places = own[valid]
    wanted = {
        "tokens": (batch.input_ids, sequence.tokens[places]),
        "labels": (batch.labels, _labels(sequence, documents)[places]),
        "positions": (batch.position_ids, _positions(sequence, documents)[places]),
    }
    wrong = [name for name, (found, right) in wanted.items() if not np.array_equal(_host(found)[valid], right)]
    if batch.documents is not None and not np.array_equal(_host(batch.documents), sequence.documents):
        wrong.append("documents")
    return wrong


def sequence_number(sequence: TokenSequence) -> int:
    """Return a whole number of 63 bits that stands for a sequence: all ranks that share it must have the same."""
    return number_of(sequence.tokens.tobytes() + sequence.documents.tobytes())


def _labels(sequence: TokenSequence, asked: DocumentsSection) -> NDArray[np.int64]:
    """Return int64 [S]: the next token; IGNORED_LABEL at the end, before padding, and, if asked, before documents."""
    labels = np.append(sequence.tokens[1:].astype(np.int64), IGNORED_LABEL)
    if asked.loss:
        labels[:-1][sequence.documents[1:] != sequence.documents[:-1]] = IGNORED_LABEL
    if sequence.padding is not None:
        labels[:-1][sequence.padding[1:]] = IGNORED_LABEL
    return labels


def _positions(sequence: TokenSequence, asked: DocumentsSection) -> NDArray[np.int64]:
    """Return int64 [S]: places in the sequence, or in each token's document where positions ask for it."""
    places = np.arange(sequence.tokens.size)
    if not asked.positions:
        return places
    begins = np.append(True, sequence.documents[1:] != sequence.documents[:-1])
    return places - np.maximum.accumulate(np.where(begins, places, 0))


def _host(tensor: Tensor) -> NDArray[np.int64]:
    return tensor.reshape(-1).to("cpu", torch.int64).numpy()
