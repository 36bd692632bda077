"""One layer's patterns as tensors, and the only definition of who attends whom.

Shape legend of this package: B batch, S tokens of a shard (S_q, S_k), H query heads, H_kv key/value heads, D head
dim, C column capacity, N mask blocks of the whole sequence, T tiles of a shard, W ranks.

Token query i (block I) attends key j (block J) iff i and j are valid, j <= i, their documents are equal where given,
and ((I, J) is an active block pair of the head, or i - j is less than the head's window, or j is one of the head's
columns). A rank's work splits in two disjoint parts: the *block part* (the block pair is active, or i - j is less than
the window) and the *column part* (j is a column and not in the block part). Merged by their lse they make the whole.
Documents do not bind anchors: a query of another document attends them too, always in the column part.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .window import check_windows, edge_table, whole_table, window_table


@dataclass(frozen=True, kw_only=True)
class AttentionMask:
    """One layer's patterns in global coordinates, identical on every rank.

    seq_len_tokens: valid tokens; positions beyond are padding: they attend nothing and are never attended.
    block_size: tokens of a mask block (64 or 128 on GPUs, any positive number elsewhere).
    active: bool [H, N] (block diagonals, Toeplitz) or bool [H, N, N] (active[head, query block, key block]).
    columns: int32 [H, C], sorted token positions of each head, padded at the end with seq_len_tokens; or None.
    documents: int32 [>= seq_len_tokens], the document of each global token position; or None.
    windows: tokens of each head's sliding window, 0 for none; or None. Block pairs wholly in a window become active:
        `active` holds them from then on. Known to the host, so that nobody waits for them.
    anchors: how many of the first tokens, all of the first document, are attended from every document. Every head has
        them among its columns. 0 without documents.
    own_blocks: True if every block pair (I, I) is known to be active, as selectors see to it: kernels are faster then.
        Looked up unless False where that needs no wait (`active` on the CPU); elsewhere True is believed, and not given
        is False. So who replaces `active` on a GPU must say it anew.
    Raises ValueError when shapes or dtypes do not fit together (values are not read: that would stall a GPU).
    """

    seq_len_tokens: int
    block_size: int
    active: Tensor
    columns: Tensor | None = None
    documents: Tensor | None = None
    windows: tuple[int, ...] | None = None
    anchors: int = 0
    own_blocks: bool | None = None

    def __post_init__(self) -> None:
        if self.seq_len_tokens < 1:
            raise ValueError(f"AttentionMask.seq_len_tokens: {self.seq_len_tokens} is not positive")
        if self.block_size < 1:
            raise ValueError(f"AttentionMask.block_size: {self.block_size} is not positive")
        if self.anchors and (self.documents is None or not 0 < self.anchors <= self.column_capacity):
            raise ValueError(
                f"AttentionMask.anchors: {self.anchors} need documents and as many columns, here {self.column_capacity}"
            )
        self._check_tensors()
        self._take_windows()
        if self.own_blocks is not False:
            # True may be that of another mask, which this one was made from by dataclasses.replace.
            on_host = self.active.device.type == "cpu"
            own = self.active[:, 0] if self.is_toeplitz else self.active.diagonal(dim1=1, dim2=2)
            object.__setattr__(self, "own_blocks", bool(own.all()) if on_host else self.own_blocks is True)

    def _take_windows(self) -> None:
        """Activate what of the windows are whole blocks; forget windows that cut nothing else."""
        windows = None if self.windows is None else check_windows(self.windows, self.heads)
        if windows is None or not any(windows):
            object.__setattr__(self, "windows", None)
            return
        # One as long as the sequence cuts nothing, also in its last block.
        windows = tuple(self.blocks * self.block_size if one >= self.seq_len_tokens else one for one in windows)
        object.__setattr__(self, "windows", windows)
        whole = whole_table(windows, self.block_size, self.blocks, self.active.device)
        if not self.is_toeplitz:
            distance = torch.arange(self.blocks, device=whole.device)
            distance = distance[:, None] - distance[None, :]
            whole = whole[:, distance.clamp(min=0)] & (distance >= 0)
        object.__setattr__(self, "active", self.active | whole)

    def _check_tensors(self) -> None:
        active, columns, documents, blocks = self.active, self.columns, self.documents, self.blocks
        if active.dtype != torch.bool:
            raise ValueError(f"AttentionMask.active: dtype {active.dtype} is not bool")
        if active.dim() not in (2, 3) or any(size != blocks for size in active.shape[1:]):
            raise ValueError(
                f"AttentionMask.active: shape {tuple(active.shape)} is neither [H, {blocks}] nor "
                f"[H, {blocks}, {blocks}]"
            )
        if columns is not None and columns.dtype != torch.int32:
            raise ValueError(f"AttentionMask.columns: dtype {columns.dtype} is not int32")
        if columns is not None and (columns.dim() != 2 or columns.shape[0] != self.heads):
            raise ValueError(f"AttentionMask.columns: shape {tuple(columns.shape)} is not [{self.heads}, C]")
        if documents is not None and documents.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"AttentionMask.documents: dtype {documents.dtype} is not int32")
        if documents is not None and (documents.dim() != 1 or documents.shape[0] < self.seq_len_tokens):
            raise ValueError(
                f"AttentionMask.documents: shape {tuple(documents.shape)} does not hold one document for each "
                f"of {self.seq_len_tokens} tokens"
            )

    @property
    def heads(self) -> int:
        """H, the query heads."""
        return self.active.shape[0]

    @property
    def blocks(self) -> int:
        """N, the mask blocks of the sequence: ceil(seq_len / block_size)."""
        return -(-self.seq_len_tokens // self.block_size)

    @property
    def is_toeplitz(self) -> bool:
        """True where `active` holds block diagonals, False where it holds block pairs."""
        return self.active.dim() == 2

    @property
    def column_capacity(self) -> int:
        """C, the columns that a head can hold (0 without columns)."""
        return 0 if self.columns is None else self.columns.shape[1]

    def edges(self) -> Tensor | None:
        """int32 [H, EDGES]: the block diagonals that each head's window cuts (see window.py); None without windows."""
        if self.windows is None:
            return None
        return edge_table(self.windows, self.block_size, self.blocks, self.active.device)

    def window_lengths(self) -> Tensor | None:
        """int32 [H]: the windows on the mask's device; None without."""
        return None if self.windows is None else window_table(self.windows, self.active.device)

    def of_heads(self, heads: slice | Tensor) -> AttentionMask:
        """The same mask for some of the query heads, or for all in another order (int64 [H] on the mask's device).

        Waits for the device where windows differ from head to head and come in another order.
        """
        columns = None if self.columns is None else self.columns[heads]
        windows = self.windows
        if windows is not None and (isinstance(heads, slice) or len(set(windows)) > 1):
            windows = windows[heads] if isinstance(heads, slice) else tuple(windows[head] for head in heads.tolist())
        return replace(self, active=self.active[heads], columns=columns, windows=windows)

    def to(self, device: torch.device | str) -> AttentionMask:
        """The same mask on another device."""
        move = {name: getattr(self, name) for name in ("active", "columns", "documents")}
        return replace(self, **{name: None if t is None else t.to(device) for name, t in move.items()})


def document_of(mask: AttentionMask, positions: Tensor) -> Tensor | None:
    """Documents of global token positions (any shape); padding reads the last valid token's. None without documents."""
    if mask.documents is None:
        return None
    return mask.documents[positions.long().clamp(max=mask.seq_len_tokens - 1)]


_REACH: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def document_reach(mask: AttentionMask, *, transposed: bool) -> Tensor | None:
    """int32 [N]: over how many block diagonals each block shares a document; None without documents.

    Of query blocks back to keys; transposed: of key blocks on to queries. Where documents do not rise along the
    sequence, all N. Kept with the documents; does not wait for the device.
    """
    documents = mask.documents
    if documents is None:
        return None
    known: dict[Any, Tensor] = _REACH.setdefault(documents, {})  # pyright: ignore[reportAssignmentType]
    version = 0 if documents.is_inference() else documents._version
    key = mask.seq_len_tokens, mask.block_size, transposed, version
    if key not in known:
        known[key] = _reach(mask, documents[: mask.seq_len_tokens].contiguous(), transposed=transposed)
    return known[key]


def _reach(mask: AttentionMask, documents: Tensor, *, transposed: bool) -> Tensor:
    size, blocks = mask.block_size, torch.arange(mask.blocks, device=documents.device)
    if transposed:
        last = (blocks * size + size - 1).clamp(max=mask.seq_len_tokens - 1)
        reach = (torch.searchsorted(documents, documents[last], right=True) - 1) // size - blocks
    else:
        reach = blocks - torch.searchsorted(documents, documents[blocks * size]) // size
    rising = (documents[1:] >= documents[:-1]).all()
    return torch.where(rising, reach, mask.blocks).to(torch.int32)


def allowed_pairs(mask: AttentionMask, q_positions: Tensor, k_positions: Tensor) -> Tensor:
    """bool [S_q, S_k]: both valid, causal, of one document. What every pattern is cut by, the same for all heads."""
    q, k = q_positions.long()[:, None], k_positions.long()[None, :]
    allowed = (k <= q) & (q < mask.seq_len_tokens) & (k < mask.seq_len_tokens)
    if mask.documents is not None:
        same = document_of(mask, q_positions)[:, None] == document_of(mask, k_positions)[None, :]  # pyright: ignore[reportOptionalSubscript]
        allowed = allowed & same
    return allowed


def anchor_pairs(mask: AttentionMask, q_positions: Tensor, k_positions: Tensor) -> Tensor:
    """bool [S_q, S_k]: the key is an anchor, and the query of a later document than it."""
    q, k = q_positions.long()[:, None], k_positions.long()[None, :]
    pairs = (k < mask.anchors) & (q < mask.seq_len_tokens)
    if mask.documents is None or not mask.anchors:
        return pairs
    return pairs & (document_of(mask, q_positions)[:, None] != document_of(mask, k_positions)[None, :])  # pyright: ignore[reportOptionalSubscript]


def active_block_pairs(mask: AttentionMask, head: int, q_blocks: Tensor, k_blocks: Tensor) -> Tensor:
    """bool, q_blocks broadcast with k_blocks: is this pair of global mask blocks active (of padding: any value)."""
    q, k = q_blocks.clamp(max=mask.blocks - 1), k_blocks.clamp(max=mask.blocks - 1)
    if mask.is_toeplitz:
        return mask.active[head][(q - k).clamp(min=0)] & (q >= k)
    return mask.active[head][q, k]


def edge_block_pairs(mask: AttentionMask, head: int, q_blocks: Tensor, k_blocks: Tensor) -> Tensor:
    """bool, q_blocks broadcast with k_blocks: does the window's edge cut this pair, which is not active besides."""
    edges = mask.edges()
    if edges is None:
        return torch.zeros_like(q_blocks - k_blocks, dtype=torch.bool)
    distance = q_blocks - k_blocks
    cut = (distance == edges[head, 0]) | (distance == edges[head, 1])
    return cut & (distance >= 0) & ~active_block_pairs(mask, head, q_blocks, k_blocks)


def block_part(mask: AttentionMask, head: int, q_positions: Tensor, k_positions: Tensor) -> Tensor:
    """bool [S_q, S_k]: the pairs that the block part of one head attends."""
    return allowed_pairs(mask, q_positions, k_positions) & _in_block_part(mask, head, q_positions, k_positions)


def column_part(mask: AttentionMask, head: int, q_positions: Tensor) -> Tensor:
    """bool [S_q, C]: the pairs (query, column slot) that the column part of one head attends. Empty slots: none."""
    if mask.columns is None:
        return torch.zeros(q_positions.shape[0], 0, dtype=torch.bool, device=q_positions.device)
    columns = mask.columns[head]
    within = allowed_pairs(mask, q_positions, columns) & ~_in_block_part(mask, head, q_positions, columns)
    return within | anchor_pairs(mask, q_positions, columns)


def _in_block_part(mask: AttentionMask, head: int, q_positions: Tensor, k_positions: Tensor) -> Tensor:
    q, k = q_positions.long()[:, None], k_positions.long()[None, :]
    active = active_block_pairs(mask, head, q // mask.block_size, k // mask.block_size)
    return active if mask.windows is None else active | (q - k < mask.windows[head])


def whole(mask: AttentionMask, head: int, q_positions: Tensor, k_positions: Tensor) -> Tensor:
    """bool [S_q, S_k]: the pairs that one head attends, by blocks or by columns: the definition itself."""
    attended = block_part(mask, head, q_positions, k_positions)
    if mask.columns is None or not mask.column_capacity:
        return attended
    columns, keys = mask.columns[head].long().contiguous(), k_positions.long().contiguous()
    slots = torch.searchsorted(columns, keys).clamp_(max=columns.shape[0] - 1)
    is_column = columns[slots] == keys
    of_column = allowed_pairs(mask, q_positions, k_positions) | anchor_pairs(mask, q_positions, k_positions)
    return attended | (of_column & is_column[None, :])
