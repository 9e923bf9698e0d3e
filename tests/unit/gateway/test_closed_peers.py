"""Clients that left, as the kernel knows them."""

from __future__ import annotations

import socket

from hypothesis import given
from hypothesis import strategies as st

from headrace.gateway.closed_peers import ClosedPeers, parse_dump


def test_exactly_the_clients_that_closed_are_found() -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=64) as server:
        port = server.getsockname()[1]
        peers = ClosedPeers("127.0.0.1", port)
        clients = [socket.create_connection(("127.0.0.1", port), timeout=5) for _ in range(20)]
        accepted = [server.accept()[0] for _ in clients]
        assert peers.find() == set()
        ports = {client.getsockname()[1] for client in clients[:15]}
        for client in clients[:15]:
            client.close()
        address = socket.inet_aton("127.0.0.1")
        assert peers.find() == {(address, port) for port in ports}, peers.last_error
        for sock in accepted:
            sock.close()
        assert peers.find() == set()
        for client in clients:
            client.close()
        peers.close()


@given(st.binary(max_size=300))
def test_arbitrary_answers_of_the_kernel_end(data: bytes) -> None:
    is_done, found = parse_dump(data)
    assert isinstance(is_done, bool)
    assert len(found) <= len(data) // 16
