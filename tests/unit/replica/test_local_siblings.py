"""Where a front finds its siblings' sockets."""

from __future__ import annotations

from headrace.api.messages import Sibling
from headrace.replica.local_siblings import local_siblings


def test_siblings_of_other_hosts_are_found_in_the_own_run_directory() -> None:
    far = Sibling("chat-2", "/far/peer-chat-2.sock", "S", "ready", num_open=3)
    (found,) = local_siblings([far], "/here", "chat-1")
    assert found.peer_socket == "/here/peer-chat-2.sock"
    assert (found.replica_id, found.stream_class, found.num_open) == ("chat-2", "S", 3)


def test_oneself_is_no_sibling_and_one_that_takes_no_streams_has_no_socket() -> None:
    siblings = [Sibling(name, "", "S", "ready") for name in ("chat-1", "chat-2")]
    (found,) = local_siblings(siblings, "/here", "chat-1")
    assert (found.replica_id, found.peer_socket) == ("chat-2", "")
