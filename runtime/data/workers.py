"""Tokenising over several processes: the same ids in the same order, whatever their number.

Texts are taken in batches of about a megabyte, one at a time for each process. What comes back is given in the order of
the batches, and nobody runs far ahead: memory stays bounded, and nothing depends on who was quick.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ...planner.spawned import Spawned, spawned
from ...traces.errors import InputError
from .reading import Piece

BATCH_BYTES = 1 << 20
BATCHES_AHEAD = 3  # for each process: batches that were taken, and not given back in their turn
EncodeBytes: TypeAlias = Callable[[bytes], NDArray[np.int64]]
Ids: TypeAlias = list[NDArray[np.int64]]
Tokenised: TypeAlias = Iterator[tuple[Piece, NDArray[np.int64]]]


@contextmanager
def tokenised(pieces: Iterable[Piece], encode: EncodeBytes, workers: int) -> Iterator[Tokenised]:
    """Yield an iterator of all pieces, in order, with their ids; processes that were started end with the block.

    encode: can be pickled, if there are several workers. Raises InputError when a worker was killed.
    """
    if workers == 1:
        yield ((piece, _ids(piece, encode)) for piece in pieces)
        return
    started: list[Spawned] = []
    try:
        started += (spawned(_work) for _ in range(workers))
        for worker in started:  # which start side by side meanwhile
            _send(worker.connection, encode)
        yield _spread(_batches(pieces), [worker.connection for worker in started])
    finally:
        for worker in started:
            worker.end()


def _work(connection: Connection) -> None:
    """Tokenise what comes until the other side is closed or gone."""
    try:
        encode: EncodeBytes = connection.recv()
        while True:
            connection.send(_encoded(encode, connection.recv()))
    except (EOFError, OSError):
        return


def _encoded(encode: EncodeBytes, texts: list[bytes]) -> Ids | Exception:
    try:
        return [encode(text) for text in texts]
    except Exception as error:  # raised where it is read
        return error


def _spread(batches: Iterator[list[Piece]], idle: list[Connection]) -> Tokenised:
    """Hand batches to whoever is idle, and yield what comes back in the order of batches."""
    most, first, number = BATCHES_AHEAD * len(idle), 0, 0
    busy, taken, done = dict[Connection, int](), dict[int, list[Piece]](), dict[int, Ids]()
    batch = next(batches, None)
    while batch is not None or taken:
        while batch is not None and idle and len(taken) < most:
            connection = idle.pop()
            _send(connection, [piece.content for piece in batch if isinstance(piece.content, bytes)])
            busy[connection], taken[number] = number, batch
            batch, number = next(batches, None), number + 1
        for connection in wait(list(busy)):
            assert isinstance(connection, Connection)
            done[busy.pop(connection)] = _received(connection)
            idle.append(connection)
        while first in done:
            yield from _paired(taken.pop(first), done.pop(first))
            first += 1


def _send(connection: Connection, message: Any) -> None:
    try:
        connection.send(message)
    except OSError as error:
        raise _killed() from error


def _received(connection: Connection) -> Ids:
    try:
        answer = connection.recv()
    except (EOFError, OSError) as error:
        raise _killed() from error
    if isinstance(answer, Exception):
        raise answer
    return answer


def _killed() -> InputError:
    problem = "a process that tokenised was killed; nothing was written. Fewer --workers need less memory"
    return InputError(problem, field="--workers")


def _paired(batch: list[Piece], ids: Ids) -> Tokenised:
    texts = iter(ids)
    for piece in batch:
        yield piece, next(texts) if isinstance(piece.content, bytes) else piece.content


def _batches(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    batch, size_bytes = list[Piece](), 0
    for piece in pieces:
        batch.append(piece)
        size_bytes += len(piece.content) if isinstance(piece.content, bytes) else piece.content.nbytes
        if size_bytes >= BATCH_BYTES:
            yield batch
            batch, size_bytes = [], 0
    if batch:
        yield batch


def _ids(piece: Piece, encode: EncodeBytes) -> NDArray[np.int64]:
    return encode(piece.content) if isinstance(piece.content, bytes) else piece.content
