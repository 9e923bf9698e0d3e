"""Connects ranks on several hosts, each with each, before anything is computed.

Both ends show that they know one key, which their engine made for this start and sent over a channel that is
authenticated by itself. Afterwards the connections carry numbers only. Must not know what these mean.
"""

from __future__ import annotations

import hmac
import secrets
import socket
import struct
import time
from collections.abc import Mapping

from headrace.errors import EngineDead

KEY_BYTES = 32
CONNECT_LIMIT_S = 30.0
"""Longest wait until all ranks are connected: each comes here as soon as it has read its model's header."""
_HELLO_LIMIT_S = 5.0
_RETRY_S = 0.05
_MAGIC = b"headrace ranks 1"
_NONCE_BYTES = 32
_HELLO = struct.Struct(f">{len(_MAGIC)}sH{_NONCE_BYTES}s")
_PROOF_BYTES = 32
_KEEP_ALIVE = ((socket.TCP_KEEPIDLE, 2), (socket.TCP_KEEPINTVL, 1), (socket.TCP_KEEPCNT, 3))
_USER_TIMEOUT_MS = 5000
Address = tuple[str, int]


def listen(host: str) -> socket.socket:
    """Listen on any port of `host`, an address of this machine, for other ranks. Raises OSError."""
    listener = socket.create_server((host, 0), backlog=64)
    listener.settimeout(_HELLO_LIMIT_S)
    return listener


def connect_ranks(
    rank: int, listener: socket.socket, addresses: Mapping[int, Address], key: bytes
) -> dict[int, socket.socket]:
    """Connect to the ranks below this one, which listen at `addresses`, and let those above it in.

    Returns a connection per other rank. addresses: of all ranks. Who does not know the key is turned away.
    Raises EngineDead when some rank has not come in time.
    """
    assert len(key) == KEY_BYTES
    deadline_s = time.monotonic() + CONNECT_LIMIT_S
    links: dict[int, socket.socket] = {}
    own_host = listener.getsockname()[0]
    try:
        for other in sorted(other for other in addresses if other < rank):
            links[other] = _connect(rank, own_host, addresses[other], key, deadline_s)
        while missing := sorted(other for other in addresses if other > rank and other not in links):
            if time.monotonic() > deadline_s:
                raise EngineDead(f"rank {missing[0]} has not connected within {CONNECT_LIMIT_S:g} s")
            accepted = _accept(listener, key)
            if accepted is not None and accepted[0] in missing:
                links[accepted[0]] = accepted[1]
            elif accepted is not None:
                accepted[1].close()
    except BaseException:
        for link in links.values():
            link.close()
        raise
    for link in links.values():
        _tune(link)
    return links


def _connect(rank: int, own_host: str, address: Address, key: bytes, deadline_s: float) -> socket.socket:
    reason = "nothing was tried"
    while time.monotonic() < deadline_s:
        try:
            link = socket.create_connection(address, _HELLO_LIMIT_S, source_address=(own_host, 0))
        except OSError as error:
            reason = error.strerror or str(error)
            time.sleep(_RETRY_S)
            continue
        try:
            own = secrets.token_bytes(_NONCE_BYTES)
            link.sendall(_HELLO.pack(_MAGIC, rank, own))
            answer = _receive(link, _NONCE_BYTES + _PROOF_BYTES)
            nonce, proof = answer[:_NONCE_BYTES], answer[_NONCE_BYTES:]
            if not hmac.compare_digest(proof, _proof(key, b"accepts", rank, own, nonce)):
                raise EngineDead(f"who listens at {address[0]}:{address[1]} does not know this start's key")
            link.sendall(_proof(key, b"connects", rank, own, nonce))
            return link
        except OSError as error:
            reason = error.strerror or str(error)
            link.close()
        except EngineDead:
            link.close()
            raise
    raise EngineDead(f"rank at {address[0]}:{address[1]} cannot be reached: {reason}")


def _accept(listener: socket.socket, key: bytes) -> tuple[int, socket.socket] | None:
    """Let one rank in. None: nobody came in a while, or it was somebody else."""
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
    link.setblocking(False)
    link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in _KEEP_ALIVE:
        link.setsockopt(socket.IPPROTO_TCP, option, value)
    link.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _USER_TIMEOUT_MS)
