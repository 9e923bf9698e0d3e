"""Where this front finds its siblings' engines: on its own host. Pure.

Sockets of siblings on other hosts are there, too, as ends of tunnels. Must not know of hosts or tunnels.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from headrace.api.messages import Sibling
from headrace.api.run_paths import peer_socket_path


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
