"""The launcher for a cluster: every group of processes has a host of its own, where the cluster places it.

Owns the links to the hosts. What it starts outlives it: a later launcher of the same system finds the hosts
and goes on. Must not know: what the processes do, and Ray, which is behind `Cluster`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from headrace.api.messages import (
    LauncherError,
    LauncherEvent,
    Nodes,
    NodeState,
    Processes,
    ProcessSpec,
    gateway_group,
    gateway_of_group,
)
from headrace.clock import Clock
from headrace.fabric.cluster import Cluster, ClusterUnavailable, HostLost, HostSilent
from headrace.fabric.host_keys import group_of, incarnation_of, make_key
from headrace.fabric.host_link import HostLink
from headrace.fabric.host_messages import CONTROLLER_GROUP, Membership
from headrace.fabric.host_routes import HostView, plan_tunnels
from headrace.fabric.local import LauncherLost
from headrace.fabric.own_tunnels import OwnTunnels
from headrace.fabric.reachability import PROBE_LIMIT_S, answers
from headrace.fabric.retirement import retire
from headrace.fabric.surroundings import Surroundings

MAX_QUEUED_EVENTS = 10_000
MAX_HOSTS = 2048
NODES_PERIOD_S = 1.0
RELEASE_LIMIT_S = 15.0
REPLAN_DELAY_S = 0.02
_log = logging.getLogger(__name__)
AVOIDED_S = 60.0
"""Nothing is placed on a node whose hosts were given up, until it is heard of again, or for so long: by then
Ray has seen whether it is dead."""


class RayLauncher:
    """The Launcher over a Cluster. Made by `connect`."""

    def __init__(
        self,
        cluster: Cluster,
        clock: Clock,
        identity: bytes,
        run_directory: Path | None = None,
        heartbeat: Callable[[], None] = lambda: None,
    ) -> None:
        self._heartbeat = heartbeat
        self._own_tunnels = OwnTunnels(run_directory, cluster.own_address, self._on_own_tunnels)
        self._membership = Membership(identity, cluster.own_address)
        self._replan = asyncio.Event()
        self._cluster = cluster
        self._clock = clock
        self._events: asyncio.Queue[LauncherEvent | None] = asyncio.Queue(MAX_QUEUED_EVENTS)
        self._links: dict[str, HostLink] = {}
        """By group."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._nodes: list[NodeState] = []
        self._unreleased: set[str] = set()
        """Hosts whose places could not be given back while the cluster did not answer."""
        self._given_up: dict[str, float] = {}
        """Nodes whose hosts were given up because they were silent, and until when they are avoided."""
        self._lost_reason = ""

    def __repr__(self) -> str:
        return f"RayLauncher({len(self._links)} hosts, {len(self._nodes)} nodes)"

    @classmethod
    async def connect(
        cls,
        cluster: Cluster,
        clock: Clock,
        identity: bytes,
        run_directory: Path | None = None,
        heartbeat: Callable[[], None] = lambda: None,
    ) -> RayLauncher:
        """Find the hosts of the system that are there. identity: PEM that all its hosts share
        (`cluster_identity`). run_directory: of this machine, with the identity in it; None: nothing of this
        machine but its hosts is reached by others. heartbeat: called whenever the controller asks for all
        processes, as it does every second. Raises LauncherLost."""
        launcher = cls(cluster, clock, identity, run_directory, heartbeat)
        try:
            await launcher._adopt_all()
        except ClusterUnavailable as error:
            raise LauncherLost(str(error)) from error
        launcher._spawn(launcher._watch_nodes())
        launcher._spawn(launcher._tend_tunnels())
        return launcher

    def start(self, spec: ProcessSpec) -> None:
        if self._link_of(spec.name) is not None:
            self._put(LauncherError(spec.name, "a process of this name is running"))
            return
        group = spec.group or spec.name
        link = self._links.get(group)
        if link is None or link.is_over:
            if len(self._links) >= MAX_HOSTS:
                self._put(
                    LauncherError(spec.name, f"there are {MAX_HOSTS} hosts already, the most there may be")
                )
                return
            link = self._links[group] = self._make_link(
                make_key(group, _incarnation(), 1 + len(spec.companions))
            )
            link.start(spec)
            self._spawn(self._live(link))
        else:
            link.start(spec)

    def stop(self, name: str, grace_s: float) -> None:
        link = self._link_of(name)
        if link is None:
            self._put(LauncherError(name, "no such process"))
        else:
            link.stop(name, grace_s)

    def list_processes(self) -> None:
        self._heartbeat()
        self._put(Processes([state for link in self._links.values() for state in link.processes.values()]))

    async def next_event(self) -> LauncherEvent:
        event = None if self._lost_reason and self._events.empty() else await self._events.get()
        if event is None:
            raise LauncherLost(self._lost_reason)
        return event

    def close(self) -> None:
        self._own_tunnels.close()
        for task in self._tasks:
            task.cancel()

    # ---- hosts ----------------

    def _make_link(self, key: str) -> HostLink:
        surroundings = Surroundings(
            self._membership,
            self._count_family,
            self._count_asked,
            self._silent_nodes,
            self._replan.set,
            self._can_reach,
            self._on_unavailable,
        )
        return HostLink(key, self._cluster, self._clock, self._put, surroundings)

    async def _adopt_all(self) -> None:
        """Of several hosts of one group, the newest is it; the others were given up and are released."""
        self._nodes = await self._cluster.nodes()
        self._put(Nodes(self._nodes, self._cluster.own_node_id))
        newest: dict[str, str] = {}
        for key in sorted(await self._cluster.hosts(), key=incarnation_of):
            group = group_of(key)
            if group in newest:
                self._spawn(self._retire(newest[group]))
            newest[group] = key
        await asyncio.gather(*(self._adopt(key) for key in newest.values()))

    async def _adopt(self, key: str) -> None:
        link = self._make_link(key)
        try:
            await link.adopt()
        except HostSilent:
            link.assume()
        except HostLost:
            self._spawn(self._release(key))
            return
        if not link.processes:  # nothing alive is in it
            self._spawn(self._release(key))
            return
        self._links[link.group] = link
        self._spawn(self._live(link, is_adopted=True))

    async def _live(self, link: HostLink, *, is_adopted: bool = False) -> None:
        try:
            await link.run(is_adopted=is_adopted)
        finally:
            if self._links.get(link.group) is link:
                del self._links[link.group]
            self._replan.set()
            if not link.is_released:
                self._unreleased.add(link.key)
            if link.was_given_up:
                self._spawn(self._retire(link.key, link.node_id))

    async def _tend_tunnels(self) -> None:
        """Tell every host what its machine's tunnels are to do, whenever that may have changed."""
        while True:
            await self._replan.wait()
            await asyncio.sleep(REPLAN_DELAY_S)  # changes come in crowds
            self._replan.clear()
            links = [link for link in self._links.values() if link.address and not link.is_over]
            views = [view for link in links for view in link.views()]
            if any(link.is_unheard for link in self._links.values()):
                continue  # what goes through its tunnels is cut by no guess; it is heard of, or given up
            home = self._cluster.own_address
            is_alone = all(view.address != home for view in views)
            views.append(HostView(CONTROLLER_GROUP, home, self._own_tunnels.address))
            wishes = plan_tunnels(views, home)
            self._own_tunnels.set(wishes.get(home) if is_alone else None)
            for link in links:
                link.set_tunnels(wishes)

    def _on_own_tunnels(self, problem: str) -> None:
        if problem:
            _log.warning("%s", problem)
        self._replan.set()

    async def _retire(self, key: str, node_id: str = "") -> None:
        """End a host that may live on. node_id: where it is, if nothing is to be placed there until then."""
        try:
            if node_id:
                self._given_up[node_id] = self._clock.now_s() + AVOIDED_S
            if await retire(self._cluster, key):
                self._given_up.pop(node_id, None)
        except ClusterUnavailable:
            self._unreleased.add(key)

    async def _release(self, key: str) -> None:
        with contextlib.suppress(ClusterUnavailable, TimeoutError):
            async with asyncio.timeout(RELEASE_LIMIT_S):
                await self._cluster.release(key)

    def _link_of(self, name: str) -> HostLink | None:
        return next((link for link in self._links.values() if name in link.names()), None)

    def _count_family(self, name: str) -> Counter[str]:
        return Counter(link.node_id for link in self._family(name) if link.node_id)

    def _count_asked(self, name: str) -> Counter[str]:
        others = [link for link in self._family(name) if link.group != name and not link.node_id]
        return Counter(link.liked_node_id for link in others if link.liked_node_id)

    def _silent_nodes(self) -> set[str]:
        self._forget_given_up()
        silent = (node for link in self._links.values() for node in link.silent_nodes())
        return {*silent, *self._given_up}

    def _forget_given_up(self) -> None:
        """Avoid nobody for longer than was meant."""
        now_s = self._clock.now_s()
        self._given_up = {node: until_s for node, until_s in self._given_up.items() if until_s > now_s}

    async def _can_reach(self, address: str) -> bool:
        """Whether whoever holds that machine's tunnels can be connected to; no tunnels: no."""
        tunnels = self._tunnels_at(address)
        return bool(tunnels) and await answers(tunnels, PROBE_LIMIT_S)

    def _on_unavailable(self, node_id: str, address: str) -> None:
        """Ray takes a node that lost its power for alive for half a minute; until then places that are asked
        for may be promised there."""
        tunnels = self._tunnels_at(address)
        if tunnels and node_id not in self._given_up:
            self._given_up[node_id] = self._clock.now_s() + AVOIDED_S
            self._spawn(self._await_answer(node_id, tunnels))

    async def _await_answer(self, node_id: str, tunnels: str) -> None:
        while node_id in self._given_up and not await answers(tunnels, PROBE_LIMIT_S):
            await asyncio.sleep(PROBE_LIMIT_S)
            self._forget_given_up()
        self._given_up.pop(node_id, None)

    def _tunnels_at(self, address: str) -> str:
        views = (view for link in self._links.values() for view in link.views())
        return next((view.tunnels for view in views if view.address == address and view.tunnels), "")

    def _family(self, name: str) -> list[HostLink]:
        family = _family_of(name)
        return [link for link in self._links.values() if _family_of(link.group) == family]

    # ---- events ----------------

    async def _watch_nodes(self) -> None:
        while True:
            with contextlib.suppress(ClusterUnavailable):  # the next try may find it
                nodes = await self._cluster.nodes()
                if nodes != self._nodes:
                    self._nodes = nodes
                    self._put(Nodes(nodes, self._cluster.own_node_id))
                for key in list(self._unreleased):
                    await self._cluster.release(key)
                    self._unreleased.discard(key)
            await asyncio.sleep(NODES_PERIOD_S)

    def _spawn(self, coroutine: object) -> None:
        assert asyncio.iscoroutine(coroutine)
        task: asyncio.Task[None] = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._on_done)

    def _on_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._lose(f"the launcher broke: {error!r}")  # our own bug: the next controller adopts all

    def _put(self, event: LauncherEvent) -> None:
        if self._events.full():
            self._lose("more events than the controller takes")
        else:
            self._events.put_nowait(event)

    def _lose(self, reason: str) -> None:
        self._lost_reason = reason
        if not self._events.full():
            self._events.put_nowait(None)


def _family_of(group: str) -> str:
    """What groups have in common that are to be on different nodes."""
    return gateway_group("") if gateway_of_group(group) else group.rpartition("-")[0]


def _incarnation() -> str:
    """Later ones sort after earlier ones, and no two are the same."""
    return f"{time.time_ns():020d}-{secrets.token_hex(3)}"
