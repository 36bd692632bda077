"""Where ranks meet: what a rank was told of its place among the others, and the store that rank 0 or a launcher opens.

torch's own store listens on all addresses of a host, asks a port that nobody serves for three times its time-out, and
waits for ever on one that a mute stranger serves. So the socket is ours, bound to the address that was given, and
whether anybody answers is found out before torch is asked. Who reaches the port may read and write everything in the
store: SECURITY.md.
"""

from __future__ import annotations

import errno
import ipaddress
import re
import socket
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from torch.distributed import PrefixStore, Store, TCPStore  # pyright: ignore[reportPrivateImportUsage]

from ...traces.errors import InputError, shown
from .lost import not_opened

LOOPBACK, ANY = "127.0.0.1", ""
RETRY_S = 0.1
BACKLOG = 4096


@dataclass(frozen=True, kw_only=True)
class Place:
    """One process among all: where they meet, and whether this one hosts the store there."""

    rank: int
    world_size: int
    address: str
    port: int
    is_host: bool

    @classmethod
    def parsed(cls, told: Mapping[str, str], *, launcher_hosts: bool) -> Place:
        """Return the place that RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT tell; InputError names the variable."""
        world_size = _number(told, "WORLD_SIZE", lowest=1)
        rank = _number(told, "RANK", lowest=0)
        if rank >= world_size:
            raise InputError(f"{rank} is not a rank of {world_size} (WORLD_SIZE): 0 to {world_size - 1}", field="RANK")
        return cls(
            rank=rank, world_size=world_size, address=_told(told, "MASTER_ADDR"),
            port=_number(told, "MASTER_PORT", lowest=1, highest=65535), is_host=rank == 0 and not launcher_hosts,
        )  # fmt: skip


def open_store(place: Place, *, timeout_s: float, wait_s: float | None = None) -> TCPStore:
    """Return the store of all ranks: served here where this one hosts it, else a connection to it.

    timeout_s: of the store's own calls; wait_s: how long to wait for its host, as long by default. InputError where the
    port is taken, or serves something else; RankLost where nobody opens it.
    """
    if place.is_host:
        return served_store(place.address, place.port, timeout_s=timeout_s)
    deadline = time.monotonic() + (timeout_s if wait_s is None else wait_s)
    numeric = _reached(place, deadline)
    return _connected(place, numeric, timeout_s, deadline)


def served_store(address: str = LOOPBACK, port: int = 0, *, timeout_s: float) -> TCPStore:
    """Serve a store at this address alone, if it is one of this host's, and return a connection to it.

    port 0: a free one. A name that stands for another host here (behind address translation), or for this host's
    loopback and so for no address that others can reach, is served on all addresses. InputError where the port is
    taken.
    """
    with _listening(address, port) as listener:
        numeric, number = listener.getsockname()[:2]
        store = TCPStore(
            LOOPBACK if numeric in ("0.0.0.0", "::") else numeric, number, is_master=True, wait_for_workers=False,
            timeout=timedelta(seconds=timeout_s), master_listen_fd=listener.fileno(),
        )  # fmt: skip
        listener.detach()  # it is the store's now
    return store


def connection_of_its_own(store: Store) -> Store | None:
    """Return another connection to the same keys of a TCPStore's server; None for other kinds of store.

    A wait on one connection holds up everybody who shares it.
    """
    server = store
    while isinstance(server, PrefixStore):
        server = server.underlying_store
    clone: Any = getattr(store, "clone", None)  # torch's stubs do not have it
    return clone() if isinstance(server, TCPStore) else None


def _listening(address: str, port: int) -> socket.socket:
    numeric = _own_address(address)
    try:
        try:
            return _bound(numeric, port)
        except OSError as error:
            if error.errno != errno.EADDRNOTAVAIL:
                raise
            return _bound(ANY, port)
    except OSError as error:
        told = (error.strerror or str(error)).lower()
        raise InputError(f"{port}: nothing can listen there at {address}: {told}", field="MASTER_PORT") from error


def _own_address(address: str) -> str:
    """Return the numeric address to bind, ANY where the name says nothing that others could use."""
    try:
        numeric = _numeric(address)
    except OSError as error:
        raise InputError(f"{address!r} is no address: {(error.strerror or str(error)).lower()}",
                         field="MASTER_ADDR") from error  # fmt: skip
    if ipaddress.ip_address(numeric.partition("%")[0]).is_loopback and address not in ("localhost", numeric):
        return ANY  # many hosts know their own name as 127.0.1.1
    return numeric


def _numeric(address: str) -> str:
    """Return the first address of a name, IPv4 before IPv6."""
    found = socket.getaddrinfo(address, None, type=socket.SOCK_STREAM)
    return str(min(found, key=lambda one: one[0] != socket.AF_INET)[4][0])


def _bound(numeric: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in numeric else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(
            socket.SOL_SOCKET, socket.SO_REUSEADDR, 1
        )  # what the last run left in TIME_WAIT is no taker
        listener.bind((numeric, port))
        listener.listen(BACKLOG)
    except OSError:
        listener.close()
        raise
    return listener


def _reached(place: Place, deadline: float) -> str:
    """Wait until somebody listens where ranks meet; return the numeric address. RankLost when nobody does."""
    while True:
        try:
            numeric = _numeric(place.address)
            left = max(deadline - time.monotonic(), RETRY_S)
            with socket.create_connection((numeric, place.port), timeout=left):
                return numeric
        except OSError as error:
            if time.monotonic() + RETRY_S > deadline:
                told = "timed out" if isinstance(error, TimeoutError) else (error.strerror or str(error)).lower()
                raise not_opened(place.address, place.port, rank=place.rank, world_size=place.world_size,
                                 because=told) from error  # fmt: skip
        time.sleep(RETRY_S)


def _connected(place: Place, numeric: str, timeout_s: float, deadline: float) -> TCPStore:
    """Connect to the store on a thread of its own: torch waits for ever where what listens does not speak."""
    made: list[Any] = []

    def connect() -> None:
        try:
            timeout = timedelta(seconds=timeout_s)
            made.append(TCPStore(numeric, place.port, is_master=False, wait_for_workers=False, timeout=timeout))
        except RuntimeError as error:
            made.append(error)

    thread = threading.Thread(target=connect, name="sparsering-connect", daemon=True)
    thread.start()
    thread.join(max(deadline - time.monotonic(), RETRY_S))
    if not made or isinstance(made[0], RuntimeError):
        told = str(made[0]).partition("\n")[0] if made else "it does not answer"
        raise InputError(f"{place.port}: what listens at {place.address} is not the ranks' store: {told}",
                         field="MASTER_PORT")  # fmt: skip
    return made[0]


def _told(told: Mapping[str, str], name: str) -> str:
    if not told.get(name):
        raise InputError("is not set: start ranks with torchrun, or set RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT",
                         field=name)  # fmt: skip
    return told[name]


def _number(told: Mapping[str, str], name: str, *, lowest: int, highest: int | None = None) -> int:
    text = _told(told, name)
    number = int(text) if re.fullmatch(r"\s*-?\d{1,18}\s*", text) else None
    if number is None or number < lowest or (highest is not None and number > highest):
        wanted = f"{lowest} or more" if highest is None else f"{lowest} to {highest}"
        raise InputError(f"{shown(text)} is no whole number, {wanted}", field=name)
    return number
