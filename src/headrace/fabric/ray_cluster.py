"""A Ray cluster behind the seam `Cluster`: placement groups, detached actors, nodes. The only user of Ray's
API, with `headrace.fabric.ray_host`, which runs inside the actors.

Owns the connection, the limit of every call, and Ray's words. Ray's calls block, so they run in threads of
ours. Must not know: what hosts hold.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from headrace.api.messages import NodeNeeds, NodeState, ProcessSpec
from headrace.fabric.cluster import ClusterUnavailable, HostLost, HostSilent, HostUnavailable, Reservation
from headrace.fabric.host_keys import further_keys, group_of, is_key, reservation_of
from headrace.fabric.host_messages import CONTROLLER_GROUP, Membership
from headrace.fabric.node_choice import label_selector
from headrace.fabric.ray_bundles import actor_options, bundle
from headrace.fabric.ray_entry import (
    check_installed,
    check_reachable,
    check_token,
    reason_of,
    resolve_address,
)
from headrace.fabric.ray_host import END_LIMIT_S, ControllerActor, HostActor

if TYPE_CHECKING:
    from ray.util.placement_group import PlacementGroup

CONNECT_LIMIT_S = 40.0
CALL_LIMIT_S = 15.0
MAX_CONCURRENCY = 16
"""Threads of a host: one poll, commands, questions, and polls of callers that gave up."""
ResultT = TypeVar("ResultT")


class RayCluster:
    """The connection of one system to a Ray cluster. Made by `connect`; one per process, which may have been
    connected before, as Ray's own workers are."""

    def __init__(self, system: str, address: str) -> None:
        self._system = system
        self._namespace = f"headrace-{system}"
        self._is_connection_ours = False
        self.address = address
        self._executor = ThreadPoolExecutor(8, thread_name_prefix="ray")
        self._actors: dict[str, Any] = {}
        self._groups: dict[str, PlacementGroup] = {}
        self._own_node_id = self._own_address = ""

    def __repr__(self) -> str:
        return f"RayCluster({self._system}, {len(self._actors)} hosts known)"

    @classmethod
    async def connect(cls, system: str, address: str) -> RayCluster:
        """Connect to the cluster at `address`, host:port of its head; `auto`: the one of this machine.

        Raises ClusterUnavailable, within seconds, with what to do.
        """
        check_installed()
        address = resolve_address(address)
        await asyncio.to_thread(check_reachable, address)
        await asyncio.to_thread(check_token, address)
        cluster = cls(system, address)
        await cluster._connect(address)
        return cluster

    @property
    def own_node_id(self) -> str:
        return self._own_node_id

    @property
    def own_address(self) -> str:
        return self._own_address

    def close(self) -> None:
        """Leave the cluster; what runs there goes on."""
        import ray

        self._executor.shutdown(wait=False, cancel_futures=True)
        if self._is_connection_ours:
            ray.shutdown()

    # ---- the seam ----------------

    async def nodes(self) -> list[NodeState]:
        return await self._run(_read_nodes)

    async def reserve(self, key: str, needs: NodeNeeds, likes_node: str, avoids: Sequence[str]) -> None:
        from ray.util.placement_group import placement_group

        num_hosts = 1 + len(further_keys(key))
        is_one = needs.num_parts == 1  # only then Ray takes a node that is liked

        def ask() -> Any:
            return placement_group(
                [bundle(needs, num_hosts)] * num_hosts,
                strategy="STRICT_PACK" if is_one else "PACK",
                name=self._group_name(key),
                lifetime="detached",
                bundle_label_selector=label_selector(needs, avoids, num_hosts),
                _soft_target_node_id=likes_node or None if is_one else None,
            )

        self._groups[key] = await self._run(ask)

    async def reservation(self, key: str) -> Reservation:
        from ray.util.placement_group import placement_group_table

        group = self._groups[key]
        entry = await self._run(placement_group_table, group)
        if entry.get("state") == "CREATED":
            return Reservation(node_id=entry["bundles_to_node_id"][0])
        return Reservation(is_gone=entry.get("state") == "REMOVED")

    async def start_host(self, key: str, needs: NodeNeeds | None, membership: Membership) -> None:
        from ray.util.scheduling_strategies import (
            NodeAffinitySchedulingStrategy,
            PlacementGroupSchedulingStrategy,
        )

        options: dict[str, Any] = {"num_cpus": 0}
        if needs is None:
            options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(self._own_node_id, soft=False)
        else:
            place, index = reservation_of(key)
            options = actor_options(needs, 1 + len(further_keys(place)))
            options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(
                self._groups[place], placement_group_bundle_index=index
            )
        arguments = (self._system, group_of(key), msgspec.msgpack.encode(membership))
        await self._start_actor(HostActor, key, options, arguments, max_restarts=0)

    async def call(self, key: str, method: str, *arguments: object, limit_s: float) -> bytes:
        from ray.exceptions import ActorUnavailableError, RayError

        actor = await self._find_actor(key)
        try:
            async with asyncio.timeout(limit_s):
                answer: bytes = await asyncio.wrap_future(getattr(actor, method).remote(*arguments).future())
                return answer
        except TimeoutError:
            raise HostSilent(f"no answer within {limit_s:.1f} s") from None
        except ActorUnavailableError as error:
            raise HostUnavailable(reason_of(error)) from None
        except RayError as error:
            raise HostLost(reason_of(error)) from None

    async def release(self, key: str) -> None:
        import ray
        from ray.util.placement_group import remove_placement_group

        keys = [key, *further_keys(key)]
        ends = (self.call(each, "end", limit_s=END_LIMIT_S) for each in keys)
        await asyncio.gather(*map(_unless_gone, ends))  # killed by Ray, they could not clean up
        actors = {each: self._actors.pop(each, None) for each in keys}
        group = self._groups.pop(key, None)

        def end() -> None:
            for each, actor in actors.items():
                with contextlib.suppress(ValueError):  # it is gone
                    ray.kill(actor or ray.get_actor(each, namespace=self._namespace), no_restart=True)
            if found := group or _find_group(self._group_name(key), self._namespace):
                remove_placement_group(found)

        await self._run(end)

    async def hosts(self) -> list[str]:
        from ray.util.placement_group import placement_group_table

        prefix = self._group_name("")

        def find() -> set[str]:
            groups = placement_group_table().values()
            reserved = {
                entry["name"].removeprefix(prefix)
                for entry in groups
                if entry["name"].startswith(prefix) and entry["state"] != "REMOVED"
            }
            return reserved | {reservation_of(name)[0] for name in self._actor_names() if is_key(name)}

        return sorted(await self._run(find))

    # ---- the controller ----------------

    async def start_controller(self, spec: ProcessSpec, identity: bytes) -> None:
        """Start the controller's host on the cluster's head. identity: PEM of the system's own. Ray keeps it
        for the actor's restarts. Raises ClusterUnavailable if there is one."""
        from ray.exceptions import ActorAlreadyExistsError

        options: dict[str, Any] = {"num_cpus": 0, "resources": {"node:__internal_head__": 0.001}}
        arguments = (self._system, msgspec.msgpack.encode(spec), identity)
        try:
            await self._start_actor(ControllerActor, CONTROLLER_GROUP, options, arguments, max_restarts=-1)
        except ActorAlreadyExistsError:
            raise ClusterUnavailable(
                f"a system called {self._system!r} already runs on this cluster. "
                f"Stop it (headrace down --name {self._system}), or give this one another --name."
            ) from None

    async def has_controller(self, limit_s: float = CALL_LIMIT_S) -> bool:
        """Whether the system's controller has a host."""
        return CONTROLLER_GROUP in await self._run(self._actor_names, limit_s=limit_s)

    # ---- inside ----------------

    async def _connect(self, address: str) -> None:
        import ray

        def connect() -> None:
            if not ray.is_initialized():
                logging.getLogger("ray").setLevel(logging.ERROR)
                ray.init(
                    address=address,
                    namespace=self._namespace,
                    log_to_driver=False,
                    configure_logging=False,
                    logging_level=logging.ERROR,
                )
                self._is_connection_ours = True
            self._own_node_id = ray.get_runtime_context().get_node_id()
            self._own_address = str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]

        try:
            await self._run(connect, limit_s=CONNECT_LIMIT_S)
        except ClusterUnavailable as error:
            raise ClusterUnavailable(f"the Ray cluster at {address} cannot be used: {error}") from None

    async def _start_actor(
        self,
        kind: type,
        name: str,
        options: dict[str, Any],
        arguments: tuple[object, ...],
        *,
        max_restarts: int,
    ) -> None:
        import ray

        def start() -> Any:
            return (
                ray.remote(kind)
                .options(
                    name=name,
                    namespace=self._namespace,
                    lifetime="detached",
                    max_restarts=max_restarts,
                    max_concurrency=MAX_CONCURRENCY,
                    **options,
                )
                .remote(*arguments)
            )

        self._actors[name] = await self._run(start)

    async def _find_actor(self, key: str) -> Any:
        import ray

        actor = self._actors.get(key)
        if actor is None:
            try:
                actor = await self._run(ray.get_actor, key, self._namespace)
            except ValueError:
                raise HostLost("Ray has no such actor") from None
            self._actors[key] = actor
        return actor

    async def _run(
        self, function: Callable[..., ResultT], *arguments: object, limit_s: float = CALL_LIMIT_S
    ) -> ResultT:
        """Run one of Ray's blocking calls in a thread."""
        from ray.exceptions import ActorAlreadyExistsError, RayError

        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(limit_s):
                return await loop.run_in_executor(self._executor, function, *arguments)
        except TimeoutError:
            raise ClusterUnavailable(f"Ray has not answered for {limit_s:.0f} s") from None
        except ActorAlreadyExistsError:
            raise
        except (RayError, RuntimeError, OSError) as error:
            raise ClusterUnavailable(reason_of(error)) from None

    def _actor_names(self) -> list[str]:
        import ray

        named = ray.util.list_named_actors(all_namespaces=True)
        return [entry["name"] for entry in named if entry["namespace"] == self._namespace]

    def _group_name(self, key: str) -> str:
        return f"{self._namespace}/{key}"


async def _unless_gone(call: Awaitable[bytes]) -> None:
    with contextlib.suppress(HostLost, HostSilent):
        await call


def _find_group(name: str, namespace: str) -> PlacementGroup | None:
    """Ray's own function looks only into the namespace of the process."""
    from ray._private.state import state
    from ray._raylet import PlacementGroupID
    from ray.util.placement_group import PlacementGroup

    entry = state.get_placement_group_by_name(name, namespace)  # type: ignore[no-untyped-call]
    return entry and PlacementGroup(PlacementGroupID(bytes.fromhex(entry["placement_group_id"])))


def _read_nodes() -> list[NodeState]:
    import ray
    from ray._private.state import available_resources_per_node, state

    available = available_resources_per_node()  # type: ignore[no-untyped-call]
    draining_ms = state.get_draining_nodes()
    return [
        NodeState(
            node_id=node["NodeID"],
            address=node["NodeManagerAddress"],
            is_alive=node["Alive"],
            total=_counted(node["Resources"]),
            available=_counted(available.get(node["NodeID"], {})),
            labels=dict(node["Labels"]),
            is_draining=node["NodeID"] in draining_ms,
            drain_deadline_s=draining_ms.get(node["NodeID"], 0) / 1000,
        )
        for node in ray.nodes()  # type: ignore[no-untyped-call]
    ]


def _counted(resources: dict[str, float]) -> dict[str, float]:
    """Without what Ray adds for itself: names of nodes and of placement groups."""
    return {
        name: amount
        for name, amount in resources.items()
        if not name.startswith(("node:", "bundle_"))
        and "_group_" not in name
        and name != "object_store_memory"
    }
