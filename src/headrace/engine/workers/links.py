"""Connects ranks on several hosts, each with each, and the engine with each, before anything is computed.

Both ends show that they know one key, which their engine made for this start and sent over a channel that is
authenticated by itself. Must not know what is said over the connections.
"""

from __future__ import annotations

import hmac
import secrets
import socket
import struct
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from headrace.errors import EngineDead

KEY_BYTES = 32
CONNECT_LIMIT_S = 30.0
"""Longest time in which a rank's address takes no connection at all."""
_HELLO_LIMIT_S = 5.0
_ACCEPT_LIMIT_S = 0.2
_RETRY_S = 0.05
_MAGIC = b"headrace ranks 1"
_NONCE_BYTES = 32
_HELLO = struct.Struct(f">{len(_MAGIC)}sH{_NONCE_BYTES}s")
_PROOF_BYTES = 32
_KEEP_ALIVE = ((socket.TCP_KEEPIDLE, 2), (socket.TCP_KEEPINTVL, 1), (socket.TCP_KEEPCNT, 3))
_USER_TIMEOUT_MS = 5000
Address = tuple[str, int]


@dataclass(frozen=True, slots=True)
class Meeting:
    """Where an engine's ranks meet that share no memory."""

    host: str
    """Address of the engine's machine."""
    key: bytes
    """Of this start alone: who knows it is one of its ranks."""

    def __repr__(self) -> str:
        return f"Meeting({self.host!r})"  # the key is for nobody's log


@dataclass(frozen=True, slots=True)
class Door:
    """Where one rank lets others in while they come together."""

    listener: socket.socket
    key: bytes

    def __repr__(self) -> str:
        return f"Door({self.address})"

    @property
    def address(self) -> Address:
        host, port = self.listener.getsockname()
        return host, port


Check = Callable[[], None]
"""Raises why waiting is of no use any more."""


def listen(host: str) -> socket.socket:
    """Listen on any port of `host`, an address of this machine, for other ranks. Raises OSError."""
    listener = socket.create_server((host, 0), backlog=64)
    listener.settimeout(_ACCEPT_LIMIT_S)
    return listener


def connect_ranks(
    rank: int,
    listener: socket.socket,
    addresses: Mapping[int, Address],
    key: bytes,
    check: Check = lambda: None,
    limit_s: float = CONNECT_LIMIT_S,
) -> dict[int, socket.socket]:
    """Connect to the ranks below this one, which listen at `addresses`, and let those above it in.

    Returns a connection per other rank, none of which waits. addresses: of all ranks. Who does not know the
    key is turned away. limit_s: for all to come: each does so when it has read its model's header. Raises
    EngineDead when some rank has not come in time, and what `check` raises.
    """
    deadline_s = time.monotonic() + limit_s
    links: dict[int, socket.socket] = {}
    own_host = listener.getsockname()[0]
    try:
        for other in sorted(other for other in addresses if other < rank):
            links[other] = dial(rank, own_host, addresses[other], key, check, deadline_s)
        while missing := sorted(other for other in addresses if other > rank and other not in links):
            check()
            if time.monotonic() > deadline_s:
                raise EngineDead(f"rank {missing[0]} has not connected within {limit_s:g} s")
            accepted = accept(listener, key)
            if accepted is not None and accepted[0] in missing:
                links[accepted[0]] = accepted[1]
            elif accepted is not None:
                accepted[1].close()
    except BaseException:
        for link in links.values():
            link.close()
        raise
    for link in links.values():
        link.setblocking(False)
    return links


def dial(
    rank: int, own_host: str, address: Address, key: bytes, check: Check, deadline_s: float
) -> socket.socket:
    """Connect to who listens at `address` and knows the key, as `rank`. deadline_s: on the monotonic clock,
    for whoever listens to let us in. Raises EngineDead, and what `check` raises."""
    assert len(key) == KEY_BYTES
    unheard_s = time.monotonic() + CONNECT_LIMIT_S
    reason = "nothing was tried"
    while time.monotonic() < min(deadline_s, unheard_s):
        check()
        try:
            link = socket.create_connection(address, _HELLO_LIMIT_S, source_address=(own_host, 0))
        except OSError as error:
            reason = error.strerror or str(error)
            time.sleep(_RETRY_S)
            continue
        try:
            _prove(link, rank, address, key)
            _tune(link)
            return link
        except OSError as error:  # it is busy, and lets us in later, or ends
            reason = error.strerror or str(error)
            unheard_s = time.monotonic() + CONNECT_LIMIT_S
            link.close()
            time.sleep(_RETRY_S)
        except BaseException:
            link.close()
            raise
    raise EngineDead(f"rank at {address[0]}:{address[1]} cannot be reached from {own_host}: {reason}")


def _prove(link: socket.socket, rank: int, address: Address, key: bytes) -> None:
    """Show who listens there that we know the key, and have it shown. Raises OSError, EngineDead."""
    own = secrets.token_bytes(_NONCE_BYTES)
    link.sendall(_HELLO.pack(_MAGIC, rank, own))
    answer = _receive(link, _NONCE_BYTES + _PROOF_BYTES)
    nonce, proof = answer[:_NONCE_BYTES], answer[_NONCE_BYTES:]
    if not hmac.compare_digest(proof, _proof(key, b"accepts", rank, own, nonce)):
        raise EngineDead(f"who listens at {address[0]}:{address[1]} does not know this start's key")
    link.sendall(_proof(key, b"connects", rank, own, nonce))


def accept(listener: socket.socket, key: bytes) -> tuple[int, socket.socket] | None:
    """Let one rank in, and say which it is. None: nobody came in a moment, or it was somebody else."""
    assert len(key) == KEY_BYTES
    try:
        link, _ = listener.accept()
    except OSError:
        return None
    try:
        link.settimeout(_HELLO_LIMIT_S)
        magic, rank, theirs = _HELLO.unpack(_receive(link, _HELLO.size))
        if magic == _MAGIC:
            own = secrets.token_bytes(_NONCE_BYTES)
            link.sendall(own + _proof(key, b"accepts", rank, theirs, own))
            proof = _receive(link, _PROOF_BYTES)
            if hmac.compare_digest(proof, _proof(key, b"connects", rank, theirs, own)):
                _tune(link)
                return rank, link
    except OSError:
        pass
    link.close()
    return None


def _proof(key: bytes, does: bytes, rank: int, connects: bytes, accepts: bytes) -> bytes:
    return hmac.digest(key, _MAGIC + does + rank.to_bytes(2, "big") + connects + accepts, "sha256")


def _receive(link: socket.socket, num_bytes: int) -> bytes:
    """So many bytes, within a few seconds. Raises OSError."""
    deadline_s = time.monotonic() + _HELLO_LIMIT_S
    data = b""
    while len(data) < num_bytes:
        link.settimeout(max(deadline_s - time.monotonic(), 0.001))
        chunk = link.recv(num_bytes - len(data))
        if not chunk:
            raise ConnectionResetError("it closed the connection")
        data += chunk
    return data


def _tune(link: socket.socket) -> None:
    """Send at once, and notice a host that fell silent within seconds (tcp(7))."""
    link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in _KEEP_ALIVE:
        link.setsockopt(socket.IPPROTO_TCP, option, value)
    link.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _USER_TIMEOUT_MS)
