"""Where this front finds its siblings' engines, on its own host, and how they are as places. Pure.

Sockets of siblings on other hosts are there, too, as ends of tunnels. Must not know of hosts or tunnels.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from headrace.api.messages import Sibling
from headrace.api.run_paths import peer_socket_path
from headrace.policy.resumption import SiblingView


def local_siblings(siblings: Iterable[Sibling], run_dir: str, own_id: str = "") -> list[Sibling]:
    """Return `siblings` without `own_id`, with the paths of their sockets in `run_dir`: each names its own as
    its own host has it. One that takes no streams has none."""
    return [
        msgspec.structs.replace(
            sibling,
            peer_socket=peer_socket_path(run_dir, sibling.replica_id) if sibling.peer_socket else "",
        )
        for sibling in siblings
        if sibling.replica_id != own_id
    ]


def is_leaving(sibling: Sibling | None) -> bool:
    """Whether it gives away what it has."""
    return sibling is not None and (sibling.state in ("draining", "standby") or sibling.leave_by_s >= 0)


def view_of(sibling: Sibling, num_sent: int, num_suspects: int) -> SiblingView:
    """Return a sibling as a place. num_sent: streams sent to it since its last report."""
    return SiblingView(
        sibling.replica_id,
        sibling.stream_class,
        is_ready=sibling.state == "ready" and bool(sibling.peer_socket) and sibling.leave_by_s < 0,
        may_become_ready=sibling.state == "starting",
        num_open=sibling.num_open + num_sent,
        max_open=sibling.max_open,
        num_suspects=num_suspects,
    )
