"""One request on its way through a simulated HAProxy: to a server, to the relay, or to an answer of its own.

Mirrors what `gateway.haproxy_frontend` renders for each request, retries included. Must not know how HAProxy
learns of servers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from headrace.gateway.arrivals import Bound, Refused
from headrace.gateway.haproxy_frontend import LAST, RELAY_BACKEND
from headrace.gateway.names import backend_name
from headrace.gateway.server import Server
from headrace.sim.http import HttpAgain, HttpError, HttpPiece, HttpRequest
from headrace.sim.network import End, connect

if TYPE_CHECKING:
    from headrace.sim.haproxy import HaproxyProcess

MAX_RETRIES = 3


class Parked(msgspec.Struct, frozen=True):
    """The router's word: let it wait in the relay."""


class Announcement(msgspec.Struct, frozen=True):
    """HAProxy to router: a request came. A parked one comes again under its id, as another call."""

    call: int
    request: HttpRequest
    can_park: bool
    """There is a relay, and it did not come from it."""


class Verdict(msgspec.Struct, frozen=True):
    """Router to HAProxy: where it goes, or that it is refused."""

    call: int
    decision: Bound | Refused | Parked


@dataclass(slots=True)
class ServerEntry:
    server: Server
    is_in_maintenance: bool = True
    is_up: bool = True
    num_open: int = 0


class Passage:
    """One request on its way through."""

    def __init__(
        self, owner: HaproxyProcess, call: int, request: HttpRequest, client: End, *, is_internal: bool
    ) -> None:
        """is_internal: it comes from the relay."""
        self.owner = owner
        self.call = call
        self.is_internal = is_internal
        self.is_relayed = False
        """It went to the relay, and its line says so."""
        self.request = request
        self.client = client
        self.began_s = owner.timeline.now_s
        self.is_announced = False
        self.server: ServerEntry | None = None
        self.far: End | None = None
        self.num_retries = 0
        self.is_started = False
        self.refused = ""
        """The pass that fronts refused, and that comes again."""
        self.is_client_gone = False
        self.has_ended = False
        client.on_close = self._on_client_gone

    @property
    def request_id(self) -> str:
        return self.request.request_id

    @property
    def backend(self) -> str:
        return RELAY_BACKEND if self.is_relayed else backend_name(self.request.endpoint)

    def decided(self, decision: Bound | Refused | Parked | None) -> None:
        """The router's word; None: there is none, and HAProxy chooses by itself."""
        self.is_announced = False
        if self.is_client_gone:
            self.end("C", 0)
        elif isinstance(decision, Refused):
            self._answer(HttpError(decision.status, decision.code), "L", is_routers=True)
        elif isinstance(decision, Parked):
            self._go_to_relay(msgspec.structs.replace(self.request, wait="told"))
        else:
            if decision is not None and decision.place:
                self.request = msgspec.structs.replace(self.request, place=decision.place)
            server = self.owner.find_server(self.request.endpoint, decision.server_name if decision else "")
            if server is not None or decision is not None:
                self._go(server)
            elif self.is_internal:
                self.client.send(HttpAgain())
                self.has_ended = True  # HAProxy writes no line of it
                self.client.close()
                self.owner.forget(self)
            elif self.owner.has_relay():
                self._go_to_relay(msgspec.structs.replace(self.request, wait="router"))
            else:
                self._go(None)

    def _go_to_relay(self, request: HttpRequest) -> None:
        self.is_relayed = True
        self.request = request
        owner = self.owner
        connect(owner, owner.weather, owner.relay_address, self._on_connected, self._on_no_relay)

    def _on_no_relay(self) -> None:
        if not self.has_ended:
            self._answer(HttpError(503, "the relay is away"), "S")

    def _go(self, server: ServerEntry | None) -> None:
        if server is None:
            self._answer(HttpError(503, "no server"), "L")
            return
        self.server = server
        server.num_open += 1
        owner = self.owner
        address = server.server.socket_path
        connect(owner, owner.weather, address, self._on_connected, self._on_refused)

    def _on_connected(self, far: End) -> None:
        if self.has_ended:
            far.close()
            return
        self.far = far
        far.on_message = self._on_answer
        far.on_close = self._on_far_closed
        far.send(self.request)

    def _on_refused(self) -> None:
        if self.has_ended:
            return
        assert self.server is not None
        self.server.is_up = False
        self._retry(HttpError(503, "connection refused"), "S")

    def _retry(self, otherwise: HttpError, cause: str) -> None:
        """Try elsewhere, or give this answer."""
        self._leave_server()
        if self.num_retries >= MAX_RETRIES:
            self._answer(otherwise, cause)
            return
        self.num_retries += 1
        server = self.owner.find_server(self.request.endpoint, "")
        if server is None:
            self._answer(otherwise, cause)
        else:
            self._go(server)

    def _leave_server(self) -> None:
        if self.server is not None:
            self.server.num_open -= 1
            self.server = None
        if self.far is not None:
            far, self.far = self.far, None
            far.close()

    def _on_answer(self, message: HttpError | HttpPiece) -> None:
        if self.has_ended:
            return
        if isinstance(message, HttpError):
            if message.status == 503 and not self.is_relayed:
                self._retry(message, "-")
            else:
                self._answer(message, "-")
            return
        self.is_started = True
        self.client.send(message)
        if message.end:
            self.end("-", 200)

    def _on_far_closed(self) -> None:
        if self.has_ended:
            return
        if self.is_started:
            self.end("S", 200)
        elif self.is_relayed:
            self._answer(HttpError(502, "empty response"), "S")
        else:
            self._retry(HttpError(502, "empty response"), "S")

    def _answer(self, error: HttpError, cause: str, *, is_routers: bool = False) -> None:
        if error.status == 503 and self.request.pass_name not in ("", LAST) and not is_routers:
            self.refused = self.request.pass_name
            self.client.send(HttpAgain("refused"))
        else:
            self.client.send(error)
        self.end(cause, error.status)

    def _on_client_gone(self) -> None:
        self.is_client_gone = True
        if (
            self.is_announced and not self.is_internal
        ):  # HAProxy looks at the client again when the router has answered
            self.owner.closed_clients.add(self.request_id)
        elif not self.has_ended:
            self.end("C", 200 if self.is_started else 0)

    def end(self, cause: str, status: int) -> None:
        """It is over: let both sides go, and log it."""
        if self.has_ended:
            return
        self.has_ended = True
        had_server = self.server
        self._leave_server()
        self.client.close()
        self.owner.log(self, cause, status, had_server.server if had_server is not None else None)
