"""Names inside the run directory."""

from __future__ import annotations

from headrace.api.run_paths import MAX_SOCKET_PATH_BYTES, front_socket_path


def test_a_fronts_socket_is_named_after_its_replica() -> None:
    assert front_socket_path("/run/x", "chat-1") == "/run/x/front-chat-1.sock"


def test_a_long_or_wandering_id_is_replaced_by_its_hash() -> None:
    long = front_socket_path("/run/" + "x" * 65, "y" * 47)
    assert len(long) <= MAX_SOCKET_PATH_BYTES
    assert long != front_socket_path("/run/" + "x" * 65, "y" * 46 + "z")
    assert front_socket_path("/run/x", "a/../../b").count("/") == 3


def test_a_path_too_long_for_a_socket_is_no_path() -> None:
    assert front_socket_path("/run/" + "x" * MAX_SOCKET_PATH_BYTES, "chat-1") == ""
