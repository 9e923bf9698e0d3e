"""What the link to one group's hosts knows of all others, and tells of its own. Made by the launcher.

Must not know: who asks, or what for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass

from headrace.fabric.host_messages import Membership


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What a link must know of the others."""

    membership: Membership
    """Of every host."""
    count_family: Callable[[str], Counter[str]]
    """How many processes of the family of a name each node has."""
    count_asked: Callable[[str], Counter[str]]
    """How many others of the family wait for a place that was asked on each node."""
    silent_nodes: Callable[[], Collection[str]]
    """Nodes that do not answer."""
    on_tunnels: Callable[[], None]
    """Called when a link's address or tunnels change."""
    can_reach: Callable[[str], Awaitable[bool]]
    """Whether a node of an address answers at all; told within `PROBE_LIMIT_S`."""
    on_unavailable: Callable[[str, str], None]
    """Called when the connection to a host broke, with its node and that node's address."""
