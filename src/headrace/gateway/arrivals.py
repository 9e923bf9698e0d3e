"""What comes to the dispatcher, what it answers, and who listens: plain values at its edge.

Must not know queues, replicas or HAProxy.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Protocol

import msgspec

from headrace.api.messages import TerminalState
from headrace.policy.prompt import PromptHead


class Bound(msgspec.Struct, frozen=True, eq=False, gc=False):
    """The request goes to this server. Equal to another one that says the same to HAProxy."""

    server_name: str
    explanation: str = ""
    """The decision's reasons, for `x-headrace-route`; empty unless asked for."""
    replica_id: str = ""
    reason: str = ""
    """`Placement.reason`, and the part of the prompt that it expects in the replica's prefix cache."""
    cached_ratio: float = 0.0
    front_id: str = ""
    """The durable front that the server is; empty: it is the replica's own."""

    @property
    def place(self) -> str:
        """The replica whose engine the server is to use, if that is not its own."""
        return self.replica_id if self.front_id else ""

    @property
    def _told(self) -> tuple[str, str, str]:
        return self.server_name, self.place, self.explanation

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Bound) and self._told == other._told

    def __hash__(self) -> int:
        return hash(self._told)


class Refused(msgspec.Struct, frozen=True):
    """The request is not served; the client may come again."""

    message: str
    code: str
    retry_after_s: int
    status: int = 503
    """503: the system's state is the reason; 429: the tenant's limit is."""
    eta_s: float = -1.0
    """When a replica is expected, in seconds; negative: not known."""


Answer = Callable[[Bound | Refused], None]


class RequestListener(Protocol):
    """Who wants to know of each request's end."""

    def ended(self, request_id: str, endpoint: str, state: TerminalState) -> None:
        """A request reached its one terminal state. Called once per request, arrived or not."""
        ...


class NobodyListens:
    """The listener of a dispatcher that stands alone."""

    def ended(self, request_id: str, endpoint: str, state: TerminalState) -> None:
        pass


class Arrival(
    msgspec.Struct, frozen=True, gc=False
):  # made per request: a third of a frozen dataclass's cost
    """One request as HAProxy announces it."""

    request_id: str
    endpoint: str
    answer: Answer
    """Called once, at once or later, while the dispatcher is at work: it must not call the dispatcher."""
    owner: object
    """The connection it came over; `owner_lost` ends its waiting."""
    client: Hashable = None
    """Whose leaving cancels it (`clients_left`)."""
    tenant: str = ""
    prompt: PromptHead = PromptHead()
    wants_route: bool = False
    """The client asked for the decision's reasons (`Bound.explanation`)."""
    pass_name: str = ""
    """Which pass the relay sends; all of a request have its id. Empty: the client's own."""
