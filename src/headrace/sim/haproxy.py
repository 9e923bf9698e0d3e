"""HAProxy as the rest of the system sees it: asks the router, relays, retries before the first byte, logs.

Owns its servers, their health, and each request on its way. Mirrors what `gateway.haproxy_config` renders.
Must not know how the router decides, or what a token means.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from headrace.gateway.arrivals import Bound, Refused
from headrace.gateway.completions import Completion
from headrace.gateway.haproxy_runtime import ServerState
from headrace.gateway.names import backend_name
from headrace.gateway.server import Server
from headrace.sim.http import HttpError, HttpPiece, HttpRequest
from headrace.sim.machine import Host, Process, Registry
from headrace.sim.network import End, Weather, connect

MAX_RETRIES = 3
CHECK_S = 0.25
HUNG_ROUTER_CHECKS = 5
"""Checks that a stopped router must miss until its connections are shut: about 1.5 s."""
MAX_KEPT_LINES = 256
"""Lines of the completion log that wait for a router."""


class Announcement(msgspec.Struct, frozen=True):
    """HAProxy to router: a request came."""

    request_id: str
    request: HttpRequest


class Verdict(msgspec.Struct, frozen=True):
    """Router to HAProxy: where it goes, or that it is refused."""

    request_id: str
    decision: Bound | Refused


class ConfigOnDisk:
    """The servers in haproxy.cfg: what a restarted HAProxy begins with. The keeper's `ConfigFiles`."""

    def __init__(self) -> None:
        self.servers: list[Server] = []


@dataclass(slots=True)
class _Server:
    server: Server
    is_in_maintenance: bool = True
    is_up: bool = True
    num_open: int = 0


class _Relay:
    """One request on its way through."""

    def __init__(self, owner: HaproxyProcess, request: HttpRequest, client: End) -> None:
        self.owner = owner
        self.request = request
        self.client = client
        self.began_s = owner.timeline.now_s
        self.is_announced = False
        self.server: _Server | None = None
        self.far: End | None = None
        self.num_retries = 0
        self.is_started = False
        self.is_client_gone = False
        self.has_ended = False
        client.on_close = self._on_client_gone

    @property
    def request_id(self) -> str:
        return self.request.request_id

    def decided(self, decision: Bound | Refused | None) -> None:
        """The router's word; None: there is none, and HAProxy chooses by itself."""
        self.is_announced = False
        if self.is_client_gone:
            self.end("C", 0)
        elif isinstance(decision, Refused):
            self._answer(HttpError(decision.status, decision.code), "L")
        else:
            name = decision.server_name if decision is not None else ""
            self._go(self.owner.find_server(self.request.endpoint, name))

    def _go(self, server: _Server | None) -> None:
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
            if message.status == 503:
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
        else:
            self._retry(HttpError(502, "empty response"), "S")

    def _answer(self, error: HttpError, cause: str) -> None:
        self.client.send(error)
        self.end(cause, error.status)

    def _on_client_gone(self) -> None:
        self.is_client_gone = True
        if self.is_announced:  # HAProxy looks at the client again when the router has answered
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


class HaproxyProcess(Process):
    """One HAProxy."""

    def __init__(
        self, registry: Registry, host: Host, gateway: str, run_dir: str, weather: Weather, disk: ConfigOnDisk
    ) -> None:
        super().__init__(registry, f"haproxy-{gateway}", host)
        self.gateway = gateway
        self.weather = weather
        self.closed_clients: set[str] = set()
        """Announced requests whose clients closed: what the kernel tells the router."""
        self._disk = disk
        self._run_dir = run_dir
        self._num_requests = 0
        self._missed_checks = 0
        self._spoe: End | None = None
        self._log: End | None = None
        self._lines: deque[Completion] = deque(maxlen=MAX_KEPT_LINES)
        self._relays: dict[str, _Relay] = {}
        self.servers: dict[str, _Server] = {}
        self.public = f"public-{gateway}"

    def begin(self) -> None:
        self.after(self.random.uniform(0.05, 0.3), self._start, "haproxy start")

    def _start(self) -> None:
        for server in self._disk.servers:
            self.servers[server.path] = _Server(server, is_in_maintenance=False)
        self.listen(self.public)
        self._connect_router()
        self._connect_log()
        self._check()

    def accept(self, address: str, connection: object) -> None:
        assert isinstance(connection, End)
        connection.on_message = lambda request: self._on_request(request, connection)

    # ---- requests

    def _on_request(self, request: HttpRequest, client: End) -> None:
        self._num_requests += 1
        request_id = f"hr-{self.gateway}-{self.pid}-{self._num_requests}"
        relay = _Relay(self, msgspec.structs.replace(request, request_id=request_id), client)
        self._relays[request_id] = relay
        if self._spoe is None:
            relay.decided(None)
            return
        relay.is_announced = True
        self._spoe.send(Announcement(request_id, relay.request))

    def find_server(self, endpoint: str, name: str) -> _Server | None:
        """The server that the router named if it can be used, else the least loaded one."""
        backend = backend_name(endpoint)
        able = [
            server
            for path, server in self.servers.items()
            if path.startswith(backend + "/") and server.is_up and not server.is_in_maintenance
        ]
        for server in able:
            if name and server.server.name == name:
                return server
        return min(able, key=lambda server: server.num_open, default=None)

    def log(self, relay: _Relay, cause: str, status: int, server: Server | None) -> None:
        """Write the request's line."""
        self._relays.pop(relay.request_id, None)
        self.closed_clients.discard(relay.request_id)
        line = Completion(
            relay.request_id,
            tenant=relay.request.tenant,
            path="/v1/chat/completions",
            backend=backend_name(relay.request.endpoint),
            server=server.name if server is not None else "<NOSRV>",
            status=status or -1,
            termination=f"{cause}-",
            connect_ms=0 if server is not None else -1,
            total_ms=round((self.timeline.now_s - relay.began_s) * 1000),
        )
        if self._log is not None:
            self._log.send(line)
        else:
            self._lines.append(line)

    @property
    def num_open(self) -> int:
        return len(self._relays)

    # ---- the router

    def _connect_router(self) -> None:
        again: Callable[[], None] = lambda: self._again(self._connect_router)  # noqa: E731
        connect(self, self.weather, f"{self._run_dir}/{self.gateway}/spoe.sock", self._on_router, again)

    def _on_router(self, end: End) -> None:
        self._spoe = end
        self._missed_checks = 0
        end.on_message = self._on_verdict
        end.on_close = self._on_router_lost

    def _on_verdict(self, verdict: Verdict) -> None:
        relay = self._relays.get(verdict.request_id)
        if relay is not None and relay.is_announced:
            relay.decided(verdict.decision)

    def _on_router_lost(self) -> None:
        """Go on without it: what waited for its word takes the least loaded server."""
        self._spoe = None
        for relay in list(self._relays.values()):
            if relay.is_announced:
                relay.decided(None)
        self._again(self._connect_router)

    def _connect_log(self) -> None:
        again: Callable[[], None] = lambda: self._again(self._connect_log)  # noqa: E731
        connect(self, self.weather, f"{self._run_dir}/{self.gateway}/log.sock", self._on_log, again)

    def _on_log(self, end: End) -> None:
        self._log = end
        end.on_close = self._on_log_lost
        while self._lines:
            end.send(self._lines.popleft())

    def _on_log_lost(self) -> None:
        self._log = None
        self._again(self._connect_log)

    def _again(self, connect_again: Callable[[], None]) -> None:
        self.after(0.1, connect_again, "haproxy retry")

    # ---- checks

    def _check(self) -> None:
        """Servers that refused a connection come back when they listen; a router that hangs is left."""
        self.after(CHECK_S, self._check, "haproxy check")
        for server in self.servers.values():
            listener = self.registry.listeners.get(server.server.socket_path)
            if listener is None:
                server.is_up = False
            elif not listener.is_paused:
                server.is_up = True
        spoe = self._spoe
        if spoe is not None:
            is_silent = spoe.peer.process.is_paused
            self._missed_checks = self._missed_checks + 1 if is_silent else 0
            if self._missed_checks >= HUNG_ROUTER_CHECKS:
                spoe.close()
                self._on_router_lost()

    # ---- runtime commands

    def show(self) -> dict[str, ServerState]:
        return {
            path: ServerState(path, entry.server.shown_address, entry.is_in_maintenance, entry.is_up)
            for path, entry in self.servers.items()
        }

    def add(self, server: Server) -> None:
        self.servers[server.path] = _Server(server)

    def delete(self, path: str) -> bool:
        """False while it has open requests."""
        entry = self.servers.get(path)
        if entry is not None and entry.num_open:
            return False
        self.servers.pop(path, None)
        return True
