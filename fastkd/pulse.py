"""Ranks prove to one another that they live, so that one that hangs is not waited for.

A thread of each rank says every second, over a connection of its own to rank 0, what its rank is at and how many meetings it
has come to. A process that is stopped says nothing, the connection of one that has ended is closed, and one that works for
hours speaks on. Rank 0 hears all and tells all.
"""

from __future__ import annotations

import json
import secrets
import select
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

BEAT = 1.0  # seconds between two signs of life
PATIENCE = 30.0  # seconds without one: the rank is stopped, or its machine is gone
DAY, HOUR = 86400.0, 3600.0
WORK = "its work"  # what a rank is at that has not named it
WITHIN = {"validation": HOUR, "a checkpoint": HOUR}  # how long a rank that lives may take; anything else: a day
JOINING = 600.0  # seconds: ranks connect as soon as they have met


class PeerLost(OSError):
    """Another rank has ended or hangs; in one line that names it and what it was at."""


@dataclass
class Peer:
    """Another rank, as it was last heard."""

    connection: socket.socket
    said: dict[str, Any] = field(default_factory=dict)  # its last message
    silent: float = 0.0  # seconds since then
    closed: bool = False
    _rest: bytes = b""  # of a message that has not come whole

    def listen(self) -> None:
        """Take what has come."""
        data = b""
        with suppress(OSError):
            data = self.connection.recv(1 << 16)
        self.closed = not data
        *lines, self._rest = (self._rest + data).split(b"\n")
        if lines:
            self.said, self.silent = json.loads(lines[-1]), 0.0


class Pulse:
    """This rank's signs of life and its meetings with the others.

    Args:
        rank: of this process.
        peers: rank 0: all others by rank; another rank: rank 0.
    """

    def __init__(self, rank: int, peers: dict[int, socket.socket]) -> None:
        self.phase = WORK  # what this rank is at
        self._rank, self._peers = rank, {number: Peer(connection) for number, connection in peers.items()}
        self._arrived = self._everyone = 0  # meetings that this rank, and all ranks, have come to
        self._last = (0, self.phase)  # the rank that came to the fewest, and what it is at
        self._told = 0.0
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._live, name="pulse", daemon=True)
        self._thread.start()

    def meet(self) -> None:
        """Wait until every rank has come, for as long as those that are missing live.

        Raises:
            PeerLost: one has ended or hangs.
        """
        with self._changed:
            self._arrived += 1
            number, waited, within, looked = self._arrived, 0.0, WITHIN.get(self.phase, DAY), time.monotonic()
            self._tell()
            while self._everyone < number:
                if lost := self._lost():
                    raise PeerLost(lost)
                if waited > within:
                    raise PeerLost(f"rank {self._last[0]} took more than {within / 60:.0f} minutes for {self._last[1]}")
                self._changed.wait(BEAT)
                now = time.monotonic()
                waited, looked = waited + min(now - looked, BEAT), now

    def enter(self, phase: str) -> None:
        """Say what this rank is at from now on."""
        with self._changed:
            self.phase = phase
            self._tell()

    def lost(self) -> str | None:
        """Which rank has ended or hangs, and what it was at; None where all live. Waits a moment for the news."""
        with self._changed:
            self._changed.wait_for(lambda: self._lost() is not None, 3 * BEAT)
            return self._lost()

    def close(self) -> None:
        """Leave. A rank that waits for this one learns that it has ended."""
        with self._changed:
            self._closing = True
        self._thread.join()
        for peer in self._peers.values():
            peer.connection.close()

    def _live(self) -> None:
        """Speak and listen. Looks are counted, not the clock: this process may itself have been stopped."""
        looked = time.monotonic()
        while not self._closing:
            open_ = {peer.connection: peer for peer in self._peers.values() if not peer.closed}
            ready = select.select(list(open_), [], [], BEAT / 4)[0]
            now = time.monotonic()
            passed, looked = min(now - looked, BEAT), now
            with self._changed:
                for peer in self._peers.values():
                    peer.silent += passed
                for connection in ready:
                    open_[connection].listen()
                before = self._everyone
                self._hear()
                if self._everyone > before or now - self._told >= BEAT:
                    self._tell()
                self._changed.notify_all()

    def _hear(self) -> None:
        """Take over what rank 0 says; rank 0: see who is missing."""
        if self._rank:
            said = self._peers[0].said
            self._everyone, self._last = said.get("everyone", 0), tuple(said.get("last", self._last))
        else:
            self._last = min(
                ((0, self._arrived, self.phase), *((rank, *_state(peer)) for rank, peer in self._peers.items())),
                key=lambda one: one[1],
            )[::2]
            self._everyone = min(self._arrived, *(_state(peer)[0] for peer in self._peers.values()))

    def _tell(self) -> None:
        """Say what is known here. The caller holds the lock."""
        self._told = time.monotonic()
        if self._rank:
            message: dict[str, Any] = {"arrived": self._arrived, "phase": self.phase}
        else:
            self._hear()
            message = {"everyone": self._everyone, "last": self._last, "phase": self.phase, "lost": self._lost()}
        for peer in self._peers.values():
            with suppress(OSError):
                peer.connection.sendall(json.dumps(message).encode() + b"\n")

    def _lost(self) -> str | None:
        for rank, peer in self._peers.items():
            if peer.closed:
                return f"rank {rank} has ended, during {_state(peer)[1]}"
            if peer.silent > PATIENCE:
                return f"rank {rank} hangs in {_state(peer)[1]}: it said nothing for {PATIENCE:g} s"
        said: str | None = self._peers[0].said.get("lost") if self._rank else None
        return said


def _state(peer: Peer) -> tuple[int, str]:
    """(meetings that a rank has come to, what it is at)."""
    return peer.said.get("arrived", 0), peer.said.get("phase", WORK)


def connect(rank: int, size: int, host: str | None, exchange: Callable[[Any], Any]) -> Pulse:
    """Connect this rank.

    Args:
        rank: of this process.
        size: how many ranks there are.
        host: of rank 0; None: all ranks are on one machine.
        exchange: returns to every rank what rank 0 gave.
    """
    if rank:
        address, port, token = exchange(None)
        connection = socket.create_connection((address, port), timeout=JOINING)
        connection.sendall(f"{token} {rank:8d}".encode())
        return Pulse(rank, {0: _ready(connection)})
    token, peers = secrets.token_hex(16), dict[int, socket.socket]()
    with socket.create_server(("127.0.0.1" if host is None else "", 0), backlog=size) as server:
        exchange((host or "127.0.0.1", server.getsockname()[1], token))
        server.settimeout(JOINING)
        while len(peers) < size - 1:
            connection, _ = server.accept()
            if (number := _introduced(connection, token)) is not None:
                peers[number] = _ready(connection)
            else:
                connection.close()
    return Pulse(rank, peers)


def _introduced(connection: socket.socket, token: str) -> int | None:
    """The rank of who has connected; None for a stranger."""
    connection.settimeout(10)
    with suppress(OSError, ValueError):
        said = connection.recv(len(token) + 9, socket.MSG_WAITALL).decode()
        if secrets.compare_digest(said[: len(token)], token):
            return int(said[len(token) :])
    return None


def _ready(connection: socket.socket) -> socket.socket:
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.settimeout(5)  # for a message of a hundred bytes
    return connection
