"""What simulated HTTP connections carry: a request, and an answer in pieces.

Must not know who sends or relays it.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from headrace.replica.relay_passes import Word
from headrace.sim.answers import Question


def public_address(gateway: str) -> str:
    """Return where clients find a gateway."""
    return f"public-{gateway}"


class HttpRequest(msgspec.Struct, frozen=True):
    """One generation request. The id is set by the gateway."""

    endpoint: str
    tenant: str
    question: Question
    request_id: str = ""
    place: str = ""
    """To a durable front: the replica whose engine the router named."""
    wait: Literal["", "told", "router"] = ""
    """To the relay. told: the client is to be told that it waits; router: there was none."""
    pass_name: str = ""
    """From the relay: which pass it is."""


class HttpError(msgspec.Struct, frozen=True):
    """An answer with an error status, whole."""

    status: int
    reason: str


class HttpPiece(msgspec.Struct, frozen=True):
    """A part of a streamed answer; the first one carries the head."""

    token_ids: list[int]
    end: Literal["", "done", "error"] = ""
    """done: the answer is complete. error: an error event ends it."""
    reason: str = ""
    front_id: str = ""
    """Who answers; empty: the relay, while the request waits."""
    request_id: str = ""


HttpAnswer = HttpError | HttpPiece


class HttpAgain(msgspec.Struct, frozen=True):
    """HAProxy to the relay: come again, since neither a router nor a server is there, or fronts refused."""

    word: Word = "away"
