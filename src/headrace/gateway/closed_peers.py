"""Which clients have closed their connection to HAProxy, asked of the kernel.

HAProxy 2.8 does not read from a client while it waits for the router's answer (`option abortonclose`
begins to work once a server is being connected), so it notices only resets. A connection whose peer
closed it is in the state CLOSE_WAIT until HAProxy closes it too. Source: sock_diag(7), linux/inet_diag.h.
Must not know requests.
"""

from __future__ import annotations

import socket
import struct

Peer = tuple[bytes, int]
"""Address bytes (4 or 16) and port."""

_NETLINK_SOCK_DIAG = 4
_SOCK_DIAG_BY_FAMILY = 20
_NLM_F_REQUEST, _NLM_F_DUMP = 1, 0x300
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_TCP_CLOSE_WAIT = 8
_HEADER = struct.Struct("=LHHLL")
_REQUEST = struct.Struct("=BBBBLHH16s16sLLL")
_SOCKET_ID = struct.Struct(">HH16s16s")
_SOCKET_ID_OFFSET = 4  # in inet_diag_msg: family, state, timer, retransmissions
_RECEIVE_BYTES = 65_536
_TIMEOUT_S = 0.5
_MAPPED_IPV4 = bytes(10) + b"\xff\xff"


class ClosedPeers:
    """Asks over one netlink socket. Where the kernel does not answer (a sandbox), no client seems closed."""

    def __init__(self, host: str, port: int) -> None:
        self._family, self._port = socket.AF_INET, 0
        self.watch(host, port)
        self.last_error = ""
        try:
            self._socket: socket.socket | None = socket.socket(
                socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_SOCK_DIAG
            )
            self._socket.settimeout(_TIMEOUT_S)
        except OSError as error:
            self._socket = None
            self.last_error = str(error)

    def watch(self, host: str, port: int) -> None:
        """Look at the connections to this address from now on."""
        self._family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._port = port

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()

    def find(self) -> set[Peer]:
        """Return the peers that closed a connection to our port which is still open on our side."""
        try:
            return self._dump()
        except OSError as error:
            self.last_error = str(error)
            return set()

    def _dump(self) -> set[Peer]:
        if self._socket is None:
            return set()
        request = _REQUEST.pack(
            self._family,
            socket.IPPROTO_TCP,
            0,
            0,
            1 << _TCP_CLOSE_WAIT,
            socket.htons(self._port),
            0,
            b"",
            b"",
            0,
            0,
            0,
        )
        header = _HEADER.pack(
            _HEADER.size + len(request), _SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST | _NLM_F_DUMP, 0, 0
        )
        self._socket.send(header + request)
        peers: set[Peer] = set()
        while True:
            is_done, found = parse_dump(self._socket.recv(_RECEIVE_BYTES))
            peers |= {peer for port, peer in found if port == self._port}
            if is_done:
                return peers


def parse_dump(data: bytes) -> tuple[bool, list[tuple[int, Peer]]]:
    """Return (whether the dump ends here, [(local port, peer)]) of one netlink datagram."""
    found: list[tuple[int, Peer]] = []
    offset = 0
    while offset + _HEADER.size <= len(data):
        length, kind, _, _, _ = _HEADER.unpack_from(data, offset)
        if kind in (_NLMSG_DONE, _NLMSG_ERROR) or length < _HEADER.size:
            return True, found
        start = offset + _HEADER.size
        if start + _SOCKET_ID_OFFSET + _SOCKET_ID.size > len(data):
            return True, found
        family = data[start]
        port, peer_port, _, address = _SOCKET_ID.unpack_from(data, start + _SOCKET_ID_OFFSET)
        found.append((port, (_plain_address(family, address), peer_port)))
        offset += (length + 3) & ~3
    return False, found


def _plain_address(family: int, address: bytes) -> bytes:
    if family == socket.AF_INET:
        return address[:4]
    return address[12:] if address.startswith(_MAPPED_IPV4) else address
