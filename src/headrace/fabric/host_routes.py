"""Which sockets each host offers to the others, and which of theirs it reaches. Pure.

A socket's name means the same on every host; where it is in a run directory is for that host to say.
Must not know: how sockets are carried, or what is said over them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from headrace.api.messages import gateway_group
from headrace.api.run_paths import CONTROLLER_SOCKET, peer_socket_path, router_socket_path
from headrace.fabric.host_messages import SetTunnels

CONTROLLER = "controller"
_ROUTER = "router:"
_PEER = "peer:"
_GATEWAY_GROUP = gateway_group("")


@dataclass(frozen=True, slots=True)
class HostView:
    """One host actor, as the launcher knows it."""

    group: str
    """What it holds: a gateway's processes, or a front."""
    address: str
    """Of its node."""
    tunnels: str = ""
    """Where its node's tunnels are, if it holds them."""


def plan_tunnels(hosts: Iterable[HostView], home: str) -> dict[str, SetTunnels]:
    """Return, by address, what the tunnels there are to do. `home`: the controller's address. Empty while all
    hosts have one address: then nothing has to be carried, and nobody listens."""
    offered: dict[str, list[str]] = {home: [CONTROLLER]}
    tunnels: dict[str, str] = {}
    for host in sorted(hosts, key=lambda host: host.group):
        offered.setdefault(host.address, []).append(_name_of(host.group))
        if host.tunnels:
            tunnels[host.address] = host.tunnels
    if len(offered) == 1:
        return {}
    return {
        here: SetTunnels(
            offered[here],
            {
                name: tunnels[there]
                for there in sorted(offered)
                if there != here and there in tunnels
                for name in offered[there]
            },
        )
        for here in offered
    }


def socket_path_of(name: str, run_dir: str) -> str:
    """Return where the host with `run_dir` has, or wants, the socket `name`; empty: nowhere."""
    if name == CONTROLLER:
        return f"{run_dir}/{CONTROLLER_SOCKET}"
    if name.startswith(_ROUTER):
        return router_socket_path(run_dir, name.removeprefix(_ROUTER))
    if name.startswith(_PEER):
        return peer_socket_path(run_dir, name.removeprefix(_PEER))
    return ""


def _name_of(group: str) -> str:
    if group.startswith(_GATEWAY_GROUP):
        return _ROUTER + group.removeprefix(_GATEWAY_GROUP)
    return _PEER + group
