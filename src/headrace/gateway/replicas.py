"""The replicas as the router knows them: from their load reports, until their leases end. No I/O; `now_s` in.

Owns what a report may say and when a replica counts as gone. Must not know requests or HAProxy's state.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

from headrace.api.messages import LoadReport, ReplicaState, is_same_process
from headrace.api.notation import split_address
from headrace.api.run_paths import front_socket_path
from headrace.errors import ProtocolError
from headrace.gateway.names import REPLICA_ID, encode_name
from headrace.gateway.server import Server

CLOSED_GRACE_S = 0.3
"""A replica whose connection closed is not chosen; it is gone unless it reports again within this time."""
MAX_LEASE_S = 60.0
MAX_REPLICAS = 4096
FORGET_AFTER_S = 60.0
MAX_TOKEN_S = 10.0
"""A replica that claims to need longer per token is not believed."""


@dataclass(slots=True)
class Replica:
    """One replica. Its shape is what `policy.placement` observes."""

    replica_id: str
    endpoint: str
    server: Server
    pid: int
    state: ReplicaState
    sequence: int
    lease_end_s: float
    num_open: int
    """Open there by its last report, as far as they may be of this gateway."""
    max_open: int
    connection: object
    num_open_elsewhere: int = 0
    """Open there by its last report, and sent by others: other gateways, and siblings."""
    max_running: int = 0
    """Most requests in one step of its engine; 0: unknown."""
    num_waiting: int = 0
    num_free_tokens: int = -1
    """Room in its KV memory; -1: unknown."""
    prefill_token_s: float = 0.0
    decode_token_s: float = 0.0
    step_per_request_s: float = 0.0
    num_uncomputed_tokens: int = 0
    num_connections: int = 0
    """Grows with each connection that it reports over: the first report on each lists all its prefixes."""
    num_in_flight: int = 0
    num_assigned: int = 0
    is_connected: bool = True
    is_serving: bool = False
    """HAProxy has it as a server that takes requests."""
    speaks_h2: bool = False
    is_shared_serving: bool = False
    """HAProxy has it as a server on HTTP/2, too."""
    is_gone: bool = False
    """Its lease ended; a replica that comes back is a new object."""
    server_name: str = field(init=False)
    """Its name inside HAProxy."""
    generation: str = ""
    """What it was started with, by its reports."""
    gateway_id: str = ""
    """Of a durable front: its gateway. It is a server, and nothing is bound to it: it has no engine."""
    text_class: str = ""
    node_address: str = ""
    """As in LoadReport."""

    def __post_init__(self) -> None:
        self.server_name = encode_name(self.replica_id)

    @property
    def takes_requests(self) -> bool:
        """It is ready, there, and a server in HAProxy."""
        return self.is_serving and self.is_connected and self.state == "ready"

    @property
    def paths(self) -> tuple[str, str]:
        """Where it is inside HAProxy: on HTTP/1.1 and on HTTP/2."""
        return self.server.path, self.server.shared.path


@dataclass(slots=True)
class ReplicaTable:
    """All replicas that reported and whose leases have not ended."""

    run_dir: str = ""
    gateway_id: str = ""
    """Our own, to tell our requests from those of others in a replica's report."""
    uses_h2: bool = False
    """Replicas that speak HTTP/2 get a second server for it."""
    identity: str = ""
    """As in GatewaySpec."""
    replicas: dict[str, Replica] = field(default_factory=dict)
    known_paths: dict[str, float] = field(default_factory=dict)
    """Server path -> when its replica was last there; what the ServerKeeper may take away."""
    num_ignored_reports: int = 0
    num_ignored_ends: int = 0
    revision: int = 0
    """Grows when the wanted servers may have changed."""
    durable: frozenset[str] = frozenset()
    """Endpoints whose replicas' own fronts are backups; see `set_durable`."""
    _choosable: dict[tuple[str, str], list[Replica]] = field(default_factory=dict)
    """By endpoint and generation, as far as it was asked for since the last change or report."""
    _fronts: dict[tuple[str, str], list[Replica]] = field(default_factory=dict)
    """Durable fronts that take requests, by endpoint and text class; likewise."""

    def set_durable(self, endpoints: frozenset[str]) -> None:
        """Take which endpoints are durable."""
        self.revision += self.durable != endpoints
        self.durable = endpoints

    def observe(self, report: LoadReport, connection: object, now_s: float) -> Replica | None:
        """Take a report. None if it must be ignored (out of date, or of a replica that listens nowhere yet).

        Raises ProtocolError if it says something impossible; the caller counts and goes on.
        """
        replica = self.replicas.get(report.replica_id)
        if replica is not None and not self._is_newer(replica, report, connection):
            return None
        if not report.address and replica is None:
            return None  # still starting: the controller's business
        server = _check(report, self.run_dir, self.identity, replica.server if replica is not None else None)
        if replica is None:
            if len(self.replicas) >= MAX_REPLICAS:
                raise ProtocolError(f"more than {MAX_REPLICAS} replicas report")
            replica = Replica(
                report.replica_id, report.endpoint, server, 0, "starting", 0, 0.0, 0, 0, connection
            )
            self.revision += 1
            self._note_paths(server, now_s)
            self.replicas[report.replica_id] = replica
        if replica.server.endpoint != server.endpoint:
            raise ProtocolError(f"replica {report.replica_id} changed its endpoint to {report.endpoint!r}")
        before = (replica.server, replica.state, replica.speaks_h2, replica.is_connected)
        if before != (server, report.state, report.speaks_h2, True):
            self.revision += 1
            self._note_paths(server, now_s)
        replica.server = server
        replica.speaks_h2 = report.speaks_h2
        replica.pid, replica.node_address = report.pid, report.node_address
        replica.generation = report.generation
        replica.gateway_id, replica.text_class = report.gateway_id, report.text_class
        replica.state = report.state
        replica.sequence = report.sequence
        replica.lease_end_s = now_s + report.lease_s
        replica.max_open = report.max_open
        replica.num_connections += replica.connection is not connection
        replica.connection = connection
        self._observe_load(replica, report)
        replica.is_connected = True
        self._forget_choices()
        return replica

    def connection_closed(self, connection: object, now_s: float) -> bool:
        """Shorten the leases of the replicas that reported over it. True if there was one."""
        is_changed = False
        for replica in self.replicas.values():
            if replica.connection is connection and replica.is_connected:
                replica.is_connected = False
                self._forget_choices()
                replica.lease_end_s = min(replica.lease_end_s, now_s + CLOSED_GRACE_S)
                self.revision += 1
                is_changed = True
        return is_changed

    def expire(self, now_s: float) -> list[Replica]:
        """Remove and return the replicas whose leases ended."""
        gone = [replica for replica in self.replicas.values() if replica.lease_end_s <= now_s]
        for replica in gone:
            self.revision += 1
            replica.is_gone = True
            self._forget_choices()
            del self.replicas[replica.replica_id]
            self._note_paths(replica.server, now_s)
        if len(self.known_paths) > 2 * len(self.replicas):  # all of the living are known
            live = {path for replica in self.replicas.values() for path in replica.paths}
            for path, seen_s in list(self.known_paths.items()):
                if path not in live and now_s - seen_s > FORGET_AFTER_S:
                    del self.known_paths[path]
        return gone

    def mark_serving(self, paths: frozenset[str]) -> None:
        """Record which servers HAProxy has."""
        self._forget_choices()
        for replica in self.replicas.values():
            replica.is_serving, replica.is_shared_serving = (path in paths for path in replica.paths)

    def choosable(self, endpoint: str, generation: str = "") -> list[Replica]:
        """Return the replicas that a request of `endpoint` may be bound to, full ones included; only those of
        `generation` if it is named. The same list until one of them reports or changes: `Placer.place` relies
        on it."""
        choosable = self._choosable.get((endpoint, generation))
        if choosable is None:
            choosable = self._choosable[endpoint, generation] = [
                replica
                for replica in self.replicas.values()
                if replica.endpoint == endpoint
                and not replica.gateway_id
                and replica.takes_requests
                and generation in ("", replica.generation)
            ]
        return choosable

    def durable_front(self, replica: Replica) -> Replica | None:
        """Return the durable front for a request that is bound to `replica`: of its text, with the fewest of
        our requests; None if none has room."""
        key = replica.endpoint, replica.text_class
        fronts = self._fronts.get(key)
        if fronts is None:
            fronts = self._fronts[key] = [
                each
                for each in self.replicas.values()
                if each.gateway_id and key == (each.endpoint, each.text_class) and each.takes_requests
            ]
        best = min(fronts, key=_num_in_flight, default=None)
        return best if best is not None and best.num_in_flight < best.max_open else None

    def wanted_servers(self) -> list[Server]:
        """Return the servers that HAProxy should have. One whose connection closed has probably died: HAProxy
        must not send retries there; it comes back with the next report."""
        ready = [
            replica for replica in self.replicas.values() if replica.state == "ready" and replica.is_connected
        ]
        servers = [self._server_of(replica) for replica in ready]
        if self.uses_h2:
            servers += [self._server_of(replica).shared for replica in ready if replica.speaks_h2]
        return servers

    def _server_of(self, replica: Replica) -> Server:
        is_backup = replica.endpoint in self.durable and not replica.gateway_id
        return replace(replica.server, is_backup=True) if is_backup else replica.server

    def _forget_choices(self) -> None:
        self._choosable.clear()
        self._fronts.clear()

    def _note_paths(self, server: Server, now_s: float) -> None:
        self.known_paths[server.path] = self.known_paths[server.shared.path] = now_s

    def _observe_load(self, replica: Replica, report: LoadReport) -> None:
        """Take the figures that placement looks at. Impossible ones count as unknown."""
        ours = report.num_open
        if report.open_by_gateway:
            ours = min(ours, max(0, report.open_by_gateway.get(self.gateway_id, 0)))
        replica.num_open = ours
        replica.num_open_elsewhere = report.num_open - ours + max(0, report.num_guests)
        info, engine = report.engine_info, report.engine
        replica.max_running = max(0, info.max_running) if info is not None else 0
        if engine is None:
            replica.num_waiting, replica.num_free_tokens, replica.num_uncomputed_tokens = 0, -1, 0
            return
        replica.num_waiting = max(0, engine.num_waiting)
        is_known = info is not None and info.block_size > 0 and engine.num_total_blocks > 0
        replica.num_free_tokens = engine.num_free_blocks * info.block_size if info and is_known else -1
        replica.prefill_token_s = _cost(engine.prefill_token_s)
        replica.decode_token_s = _cost(engine.decode_token_s)
        replica.step_per_request_s = _cost(engine.step_per_request_s)
        replica.num_uncomputed_tokens = max(0, engine.num_uncomputed_tokens)

    def _is_newer(self, replica: Replica, report: LoadReport, connection: object) -> bool:
        if is_same_process(report, replica):
            return report.sequence > replica.sequence
        if connection is replica.connection:
            return False
        # A restarted front comes over a new connection, and the kernel has closed the old one.
        if replica.is_connected:
            raise ProtocolError(
                f"process {_name(report)} reports as {report.replica_id}, "
                f"which process {_name(replica)} still does"
            )
        return True


def _name(process: Replica | LoadReport) -> str:
    return f"{process.pid} of {process.node_address}" if process.node_address else f"{process.pid}"


def _num_in_flight(replica: Replica) -> int:
    return replica.num_in_flight


def _cost(token_s: float) -> float:
    return token_s if math.isfinite(token_s) and 0 < token_s <= MAX_TOKEN_S else 0.0


def _check(report: LoadReport, run_dir: str, identity: str, known: Server | None) -> Server:
    """Return the report's server. Raises ProtocolError for what would be nonsense inside HAProxy."""
    if not 0 < report.lease_s <= MAX_LEASE_S:
        raise ProtocolError(f"lease_s is {report.lease_s}; it must be in (0, {MAX_LEASE_S:.0f}]")
    if report.num_open < 0 or not 0 <= report.max_open <= 65_536:
        raise ProtocolError(f"num_open is {report.num_open} and max_open {report.max_open}")
    if (
        known is not None
        and report.address in ("", known.tcp_address)
        and (report.endpoint, report.max_open) == (known.endpoint, known.max_open)
    ):
        return known  # nothing new: the usual case, many times a second
    if not REPLICA_ID.fullmatch(report.replica_id):
        raise ProtocolError(f"replica id {report.replica_id!r} has characters that are not allowed")
    try:
        host, port = split_address(report.address)
    except ValueError as error:
        raise ProtocolError(f"address: {error}") from error
    if port == 0:
        raise ProtocolError(f"address {report.address!r} has no port")
    # A path that a report names goes into HAProxy's config: only the one that is right can be meant.
    socket_path = front_socket_path(run_dir, report.replica_id)
    if report.socket_path != socket_path:
        socket_path = ""
    server = Server(report.endpoint, report.replica_id, host, port, report.max_open, socket_path)
    return replace(server, identity=identity)
