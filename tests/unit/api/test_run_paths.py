"""Names inside the run directory."""

from __future__ import annotations

from headrace.api.run_paths import MAX_SOCKET_PATH_BYTES, front_socket_path


def test_a_fronts_socket_is_named_after_its_replica() -> None:
    assert front_socket_path("/run/x", "chat-1") == "/run/x/front-chat-1.sock"


def test_a_path_too_long_for_a_socket_is_no_path() -> None:
    assert front_socket_path("/run/" + "x" * MAX_SOCKET_PATH_BYTES, "chat-1") == ""
