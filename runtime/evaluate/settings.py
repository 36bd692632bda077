"""What an evaluation does: which tasks, on sequences of which length, with how many repetitions."""

from __future__ import annotations

from dataclasses import dataclass

from ...traces.errors import InputError, unknown_name

LOSS, NEEDLE, TRACKING, AGGREGATION, AGREEMENT, REACH = TASKS = (
    "loss", "needle", "tracking", "aggregation", "agreement", "reach",
)  # fmt: skip
OF_TEXT, PLANTED = (LOSS, AGREEMENT, REACH), (NEEDLE, TRACKING, AGGREGATION)
OF_SELECTOR = (AGREEMENT, REACH)
LEAST_TOKENS = 512  # of a sequence with something planted in it: the question stands 256 tokens before its end


@dataclass(frozen=True, kw_only=True)
class Documents:
    """Where the ends of packed documents count, as in training: loss, positions and attention.

    loss: nothing is to predict a document's first token. positions: begin anew with each. attention: stays within each.
    """

    loss: bool = False
    positions: bool = False
    attention: bool = False


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """Settings of `evaluate`.

    tasks:              of TASKS, each once
    seq_len_tokens:     of the held-out sequences, and of the longest with something planted in them
    sequences:          how many held-out ones, drawn without repetition by the seed
    cut_context_tokens: the context that losses are compared with; 0: they are not
    documents:          where documents end, for held-out sequences
    block_size:         of the masks that a selector chooses
    seed:               of what is drawn; the same seed gives the same sequences, needles and questions
    dense_too:          with a selector, also evaluate the same weights with dense attention
    lengths:            of sequences with something planted in them, ascending; None: a quarter, a half, all of
                        seq_len_tokens
    needles:            how many a sequence has; each number is a task of its own
    depths:             into so many equal ranges of depth needles are counted
    keys:               questions of a cell, at least
    chains, hops:       of variable tracking: how many chains a sequence has, and assignments a chain
    far_tokens:         distances that `reach` asks about
    """

    tasks: tuple[str, ...] = (LOSS,)
    seq_len_tokens: int
    sequences: int = 16
    cut_context_tokens: int = 8192
    documents: Documents = Documents()
    block_size: int = 128
    seed: int = 0
    dense_too: bool = True
    lengths: tuple[int, ...] | None = None
    needles: tuple[int, ...] = (1, 10)
    depths: int = 5
    keys: int = 50
    chains: int = 4
    hops: int = 4
    far_tokens: tuple[int, ...] = (8192, 32768)

    def __post_init__(self) -> None:
        for task in self.tasks:
            if task not in TASKS:
                raise unknown_name(task, TASKS, field="tasks")
        if not self.tasks or len(set(self.tasks)) < len(self.tasks):
            raise InputError(f"are {', '.join(self.tasks) or 'none'}: name each once, one at least", field="tasks")
        least = {"seq_len_tokens": 2, "sequences": 1, "block_size": 1, "depths": 1, "keys": 1, "chains": 1, "hops": 1}
        for name, lowest in least.items():
            if getattr(self, name) < lowest:
                raise InputError(f"is {getattr(self, name)}, must be at least {lowest}", field=name)
        cut = self.cut_context_tokens
        if cut and (cut < 2 or cut % 2):
            raise InputError(f"is {cut}, must be even, or 0 for no comparison", field="cut_context_tokens")
        self._check_planted()

    def _check_planted(self) -> None:
        if not self.needles or len(set(self.needles)) < len(self.needles) or min(self.needles) < 1:
            raise InputError(f"are {list(self.needles)}: different numbers from 1", field="needles")
        if not self.asks_questions:
            return
        lengths = self.planted_lengths
        if not lengths or list(lengths) != sorted(set(lengths)):
            raise InputError(f"are {list(lengths)}: they must ascend", field="lengths")
        for length in lengths:
            if not LEAST_TOKENS <= length <= self.seq_len_tokens:
                told = f"{length} is not from {LEAST_TOKENS} to seq_len_tokens, {self.seq_len_tokens}"
                raise InputError(told, field="lengths")

    @property
    def planted_lengths(self) -> tuple[int, ...]:
        """Tokens of the sequences that something is planted in."""
        if self.lengths is not None:
            return self.lengths
        whole = self.seq_len_tokens
        return tuple(length for length in (whole // 4, whole // 2, whole) if length >= LEAST_TOKENS) or (whole,)

    @property
    def asks_questions(self) -> bool:
        """Whether a task plants something and asks about it."""
        return any(task in PLANTED for task in self.tasks)

    def all_lengths(self) -> tuple[int, ...]:
        """Return all lengths, ascending, that the model is called with."""
        found: set[int] = set(self.planted_lengths) if self.asks_questions else set()
        if any(task in OF_TEXT for task in self.tasks):
            found.add(self.seq_len_tokens)
        if LOSS in self.tasks and 0 < self.cut_context_tokens < self.seq_len_tokens:
            found.add(self.cut_context_tokens)
        return tuple(sorted(found))
