"""HAProxy as the rest of the system sees it: asks the router, relays, retries before the first byte, logs.

Owns its servers, their health, and each request on its way. Mirrors what `gateway.haproxy_config` renders.
Must not know how the router decides, or what a token means.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import msgspec

from headrace.gateway.completions import Completion
from headrace.gateway.haproxy_runtime import ServerState
from headrace.gateway.names import backend_name
from headrace.gateway.server import Server
from headrace.sim.http import HttpRequest, public_address
from headrace.sim.machine import Host, Process, Registry
from headrace.sim.network import End, Weather, connect
from headrace.sim.passage import Announcement, Passage, ServerEntry, Verdict

CHECK_S = 0.25
HUNG_ROUTER_CHECKS = 5
"""Checks that a stopped router must miss until its connections are shut: about 1.5 s."""
MAX_KEPT_LINES = 256
"""Lines of the completion log that wait for a router."""


class ConfigOnDisk:
    """The servers in haproxy.cfg: what a restarted HAProxy begins with. The keeper's `ConfigFiles`."""

    def __init__(self) -> None:
        self.servers: list[Server] = []


def internal_address(run_dir: str, gateway: str) -> str:
    """Return where the relay sends requests again."""
    return f"{run_dir}/{gateway}/internal.sock"


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
        self._is_started = False
        self.is_leaving = False
        """It takes no more connections, and ends when it has none."""
        self._spoe: End | None = None
        self._log: End | None = None
        self._lines: deque[Completion] = deque(maxlen=MAX_KEPT_LINES)
        self._passages: dict[int, Passage] = {}
        self.servers: dict[str, ServerEntry] = {}
        self.public = public_address(gateway)
        self.internal = internal_address(run_dir, gateway)
        self.relay_address = f"{run_dir}/{gateway}/relay.sock"

    def begin(self) -> None:
        self.after(self.random.uniform(0.05, 0.3), self._start, "haproxy start")

    def _start(self) -> None:
        self._is_started = True
        for server in self._disk.servers:
            self.servers[server.path] = ServerEntry(server, is_in_maintenance=False)
        self.listen(self.public)
        self.listen(self.internal)
        self._connect_router()
        self._connect_log()
        self._check()

    def accept(self, address: str, connection: object) -> None:
        assert isinstance(connection, End)
        connection.on_message = lambda request: self._on_request(request, connection)

    def terminate(self) -> None:
        """SIGUSR1: stop listening, and end when nothing is open."""
        if self.is_leaving:
            return
        self.is_leaving = True
        self.stop_listening()
        if not self._is_started or not self._passages:
            self.exit(0)

    # ---- requests

    def _on_request(self, request: HttpRequest, client: End) -> None:
        self._num_requests += 1
        call = self._num_requests
        is_internal = bool(request.request_id)
        if not is_internal:
            request = msgspec.structs.replace(request, request_id=f"hr-{self.gateway}-{self.pid}-{call}")
        passage = self._passages[call] = Passage(self, call, request, client, is_internal=is_internal)
        if self._spoe is None:
            passage.decided(None)
            return
        passage.is_announced = True
        self._spoe.send(Announcement(call, request, self.has_relay() and not is_internal))

    def has_relay(self) -> bool:
        return self.relay_address in self.registry.listeners

    def find_server(self, endpoint: str, name: str) -> ServerEntry | None:
        """The server that the router named if it can be used, else the least loaded one; a backup only if
        there is no other."""
        backend = backend_name(endpoint)
        able = [
            server
            for path, server in self.servers.items()
            if path.startswith(backend + "/") and server.is_up and not server.is_in_maintenance
        ]
        for server in able:
            if name and server.server.name == name:
                return server
        return min(able, key=lambda server: (server.server.is_backup, server.num_open), default=None)

    def forget(self, passage: Passage) -> None:
        """It is over, and its line is written."""
        self._passages.pop(passage.call, None)
        if self.is_leaving and not self._passages:
            self.after(0.0, self._end_if_idle, "haproxy ends")

    def _end_if_idle(self) -> None:
        if not self._passages:
            self.exit(0)

    def log(self, passage: Passage, cause: str, status: int, server: Server | None) -> None:
        """Write the request's line."""
        if not passage.is_internal:
            self.closed_clients.discard(passage.request_id)
        name = "relay" if passage.is_relayed else server.name if server is not None else "<NOSRV>"
        line = Completion(
            passage.request_id,
            tenant=passage.request.tenant,
            path="/v1/chat/completions",
            backend=passage.backend,
            server=name,
            status=status or -1,
            termination=f"{cause}-",
            connect_ms=0 if server is not None else -1,
            total_ms=round((self.timeline.now_s - passage.began_s) * 1000),
            refused=passage.refused,
        )
        if self._log is not None:
            self._log.send(line)
        else:
            self._lines.append(line)
        self.forget(passage)

    @property
    def num_open(self) -> int:
        return len(self._passages)

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
        passage = self._passages.get(verdict.call)
        if passage is not None and passage.is_announced:
            passage.decided(verdict.decision)

    def _on_router_lost(self) -> None:
        """Go on without it: what waited for its word takes the least loaded server."""
        self._spoe = None
        for passage in list(self._passages.values()):
            if passage.is_announced:
                passage.decided(None)
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
            elif not (listener.is_paused or self._is_unreachable(listener)):
                server.is_up = True
        spoe = self._spoe
        if spoe is not None:
            is_silent = spoe.peer.process.is_paused
            self._missed_checks = self._missed_checks + 1 if is_silent else 0
            if self._missed_checks >= HUNG_ROUTER_CHECKS:
                spoe.close()
                self._on_router_lost()

    def _is_unreachable(self, listener: Process) -> bool:
        return self.weather.unreachable_s(self.host, listener.host, self.timeline.now_s) > 0

    # ---- runtime commands

    def show(self) -> dict[str, ServerState]:
        return {
            path: ServerState(path, entry.server.shown_address, entry.is_in_maintenance, entry.is_up)
            for path, entry in self.servers.items()
        }

    def add(self, server: Server) -> None:
        self.servers[server.path] = ServerEntry(server)

    def delete(self, path: str) -> bool:
        """False while it has open requests."""
        entry = self.servers.get(path)
        if entry is not None and entry.num_open:
            return False
        self.servers.pop(path, None)
        return True
