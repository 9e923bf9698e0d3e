"""The seam to a cluster: what the launcher needs of Ray, and no more (`headrace.fabric.ray_cluster`).

Every call has a limit. Must not know: Ray.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from headrace.api.messages import NodeNeeds, NodeState
from headrace.errors import HeadraceError
from headrace.fabric.host_messages import Membership


class ClusterUnavailable(HeadraceError):
    """The cluster does not answer, refuses us, or is not what this version can use."""


class HostLost(HeadraceError):
    """A host is gone for good, and with it what it held."""


class HostUnavailable(HostLost):
    """Its connection broke: its process or its node is gone. One that is restarted comes again."""


class HostGivenUp(HostLost):
    """It was silent for too long. It may live on where nobody reaches it, and be reached again."""


class HostSilent(HeadraceError):
    """A host has not answered within the limit. It may answer later."""


@dataclass(frozen=True, slots=True)
class Reservation:
    """What was asked for a host. node_id, the first host's, is empty until it was granted."""

    node_id: str = ""
    is_gone: bool = False
    """It was taken away."""


class Cluster(Protocol):
    """A cluster as one system sees it. A host is named by its key (`host_keys`), unique for all time. A
    reservation has the key of its first host; that says how many hosts it is for: all of one node, unless
    what is needed may be divided (`NodeNeeds.num_parts`).

    Raises ClusterUnavailable, each method, when the cluster itself does not answer.
    """

    @property
    def own_node_id(self) -> str:
        """Id of the node that we are on."""
        ...

    @property
    def own_address(self) -> str:
        """Address of the node that we are on."""
        ...

    async def nodes(self) -> list[NodeState]:
        """Return all nodes."""
        ...

    async def reserve(self, key: str, needs: NodeNeeds, likes_node: str, avoids: Sequence[str]) -> None:
        """Ask for a place for the host `key`; `likes_node`: there, if it has room; `avoids`: never on these.
        `reservation` tells. What is needed is divided evenly among the hosts of the reservation."""
        ...

    async def reservation(self, key: str) -> Reservation:
        """Return what became of what was asked for `key`."""
        ...

    async def start_host(self, key: str, needs: NodeNeeds | None, membership: Membership) -> None:
        """Start the host in its reservation, or without one (needs is None) on our own node. What makes it
        one of the system's is handed over where nobody else reads it."""
        ...

    async def call(self, key: str, method: str, *arguments: object, limit_s: float) -> bytes:
        """Call a method of a host. Raises HostLost or HostSilent."""
        ...

    async def release(self, key: str) -> None:
        """End the hosts of a reservation and give the place back. Each may be gone already."""
        ...

    async def hosts(self) -> list[str]:
        """Return the keys of all reservations and first hosts of this system."""
        ...
