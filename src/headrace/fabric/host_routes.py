"""Which sockets each host offers to the others, and which of theirs it reaches. Pure.

A socket's name means the same on every host; where it is in a run directory is for that host to say.
Must not know: how sockets are carried, or what is said over them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from headrace.api.messages import gateway_group, gateway_of_group
from headrace.api.run_paths import (
    ADMIN_HTTP_SOCKET,
    CONTROLLER_SOCKET,
    alive_socket_path,
    peer_socket_path,
    rank_socket_path,
    relay_socket_path,
    router_socket_path,
    runtime_socket_path,
)
from headrace.fabric.host_messages import CONTROLLER_GROUP, SetTunnels

CONTROLLER = "controller"
ADMIN = "admin"
_PEER = "peer:"
_RANKS = "ranks:"
"""Of a replica: what holders of its ranks on other hosts reach, and nobody else."""
_ROUTER = "router:"
_PROBED = {"alive:": alive_socket_path, "runtime:": runtime_socket_path, "relay:": relay_socket_path}
"""Of a gateway: what the controller asks for life, and nobody else."""
_GATEWAY = {_ROUTER: router_socket_path, **_PROBED}


@dataclass(frozen=True, slots=True)
class HostView:
    """One host actor, as the launcher knows it."""

    group: str
    """What it holds: a gateway's processes, a front, or the controller."""
    address: str
    """Of its node."""
    tunnels: str = ""
    """Where its node's tunnels are, if it holds them."""
    rank: int = 0
    """Of a further host of the group, which holds this rank of a replica."""


def plan_tunnels(hosts: Iterable[HostView], home: str) -> dict[str, SetTunnels]:
    """Return, by address, what the tunnels there are to do. `home`: the controller's address. Empty while all
    hosts have one address: then nothing has to be carried, and nobody listens."""
    offered: dict[str, list[str]] = {home: [CONTROLLER]}
    tunnels: dict[str, str] = {}
    have_gateway: set[str] = set()
    hosts = sorted(hosts, key=lambda host: (host.group, host.rank))
    ranks_at: dict[str, set[str]] = {}
    for host in hosts:
        if host.rank:
            ranks_at.setdefault(_RANKS + host.group, set()).add(host.address)
    for host in hosts:
        offered.setdefault(host.address, []).extend(_names_of(host, home, ranks_at))
        if gateway_of_group(host.group) and host.address != home:
            have_gateway.add(host.address)
        if host.tunnels:
            tunnels[host.address] = host.tunnels
    if len(offered) == 1:
        return {}
    if have_gateway:
        offered[home].append(ADMIN)

    def is_wanted(name: str, here: str) -> bool:
        if name in ranks_at:
            return here in ranks_at[name]
        return here in have_gateway if name == ADMIN else here == home or not name.startswith(tuple(_PROBED))

    return {
        here: SetTunnels(
            offered[here],
            {
                name: tunnels[there]
                for there in sorted(offered)
                if there != here and there in tunnels
                for name in offered[there]
                if is_wanted(name, here)
            },
        )
        for here in offered
    }


def socket_path_of(name: str, run_dir: str) -> str:
    """Return where the host with `run_dir` has, or wants, the socket `name`; empty: nowhere."""
    if name == CONTROLLER:
        return f"{run_dir}/{CONTROLLER_SOCKET}"
    if name == ADMIN:
        return f"{run_dir}/{ADMIN_HTTP_SOCKET}"
    if name.startswith(_RANKS):
        return rank_socket_path(run_dir, name.removeprefix(_RANKS))
    if name.startswith(_PEER):
        return peer_socket_path(run_dir, name.removeprefix(_PEER))
    kind, mark, gateway_id = name.partition(":")
    path_of = _GATEWAY.get(kind + mark)
    return path_of(run_dir, gateway_id) if path_of and gateway_of_group(gateway_group(gateway_id)) else ""


def _names_of(host: HostView, home: str, ranks_at: Mapping[str, set[str]]) -> list[str]:
    """What a host offers of its own. ranks_at: where further ranks are, by what they reach."""
    if host.group == CONTROLLER_GROUP or host.rank:
        return []  # offered in any case; nothing
    if gateway_id := gateway_of_group(host.group):
        return [kind + gateway_id for kind in (_GATEWAY if host.address != home else [_ROUTER])]
    ranks = _RANKS + host.group
    return [_PEER + host.group, *([ranks] if ranks_at.get(ranks, set()) - {host.address} else [])]
