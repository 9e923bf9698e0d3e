"""The router process: the composition of its parts, and the sockets they live on.

Turns SPOE calls, load reports and completion lines into calls of the Dispatcher, and its wishes into servers
and demand. Must not see a response token, and must not decide: `dispatcher` and `policy` do.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
from collections.abc import Iterable
from pathlib import Path

from headrace.api.messages import Demand, GatewaySpec, Outlook, ReplicaView
from headrace.api.notation import split_address
from headrace.clock import Clock
from headrace.errors import ConfigError, ProtocolError
from headrace.gateway.answers import Answers, parked, refusal
from headrace.gateway.certificate_keeper import CertificateKeeper
from headrace.gateway.channels import CompletionConnection, ControllerLink, ReportConnection
from headrace.gateway.closed_peers import ClosedPeers
from headrace.gateway.completions import Completion, CompletionDecoder, classify
from headrace.gateway.dispatcher import Arrival, Bound, Dispatcher, Refused
from headrace.gateway.haproxy_config import max_waiting, size_max_connections
from headrace.gateway.haproxy_frontend import RELAY_BACKEND
from headrace.gateway.haproxy_identity import admin_keys
from headrace.gateway.haproxy_runtime import HaproxyRuntime
from headrace.gateway.key_map import KeyMap
from headrace.gateway.membership import Membership
from headrace.gateway.metrics_server import serve_metrics
from headrace.gateway.names import endpoint_of_backend
from headrace.gateway.outlooks import Outlooks
from headrace.gateway.paths import GatewayPaths
from headrace.gateway.placed import localized
from headrace.gateway.replicas import ReplicaTable
from headrace.gateway.request_recorder import RequestRecorder
from headrace.gateway.servers import ServerKeeper
from headrace.gateway.spoe import Arguments, SpoeAgent, SpoeCall, SpoeConnection, text_argument
from headrace.gateway.waiting import Waiting, WaitingRoom
from headrace.observability.line_log import BackgroundLog, RotatingFile
from headrace.observability.request_record import RequestRecord
from headrace.observability.request_statistics import RequestStatistics
from headrace.observability.router_metrics import RouterMetrics, RouterSnapshot
from headrace.policy.prompt import PromptHead, prompt_salt, read_prompt
from headrace.private_socket import bind_private_socket

logger = logging.getLogger(__name__)

TICK_S = 0.1
DEMAND_PERIOD_S = 0.2
RECORDS_AT_A_TIME = 32
"""Records that are written in one turn of the loop: as much work as three decisions, which wait for it."""
REQUEST_LOG_BYTES = 64 * 1024 * 1024
"""A gateway's request log, twice: the file and the one before it."""
BACKLOG = 4096
"""Connections waiting to be accepted. A UNIX socket refuses at once when it is full, unlike TCP."""


class Router:
    """One router. Create it inside a running event loop, then `run()`."""

    def __init__(self, spec: GatewaySpec, clock: Clock, fd_limit: int) -> None:
        self._spec = spec
        self._clock = clock
        self._paths = GatewayPaths(spec.run_dir, spec.gateway_id)
        runtime = HaproxyRuntime(self._paths.runtime_socket, self._paths.master_socket)
        self.replicas = ReplicaTable(
            spec.run_dir, spec.gateway_id, spec.replica_protocol == "h2", spec.identity
        )
        self._num_answered_by_haproxy = 0
        self.statistics = RequestStatistics()
        self._request_log = BackgroundLog(
            RotatingFile(Path(self._paths.request_log), REQUEST_LOG_BYTES),
            "request-log",
            stops_at_end=False,
        )
        self.recorder = RequestRecorder(spec.gateway_id, clock, self._on_record)
        self.dispatcher = Dispatcher(spec.endpoints, self.replicas, self.recorder, spec.tenants)
        self.membership = Membership(self.replicas, self.dispatcher, self.recorder, clock.now_s)
        self.keeper = ServerKeeper(spec, fd_limit, runtime, self.membership.servers_changed)
        self.membership.keeper = self.keeper
        self.membership.set_rules(spec.endpoints)
        self.keys = KeyMap(self._paths.key_map, runtime)
        self.keys.want(None, bool(spec.tenants))
        self.admin_keys = KeyMap(self._paths.admin_key_map, runtime)
        self.admin_keys.want(None, bool(spec.admin_bind))
        self.certificate = _certificate_keeper(spec, self._paths, runtime, clock)
        self.agent = SpoeAgent(self._on_notify, self._on_spoe_lost)
        self._answers = Answers()
        self._completions = CompletionDecoder()
        self._controller = ControllerLink(
            self._paths.controller_socket, DEMAND_PERIOD_S, self.demand, self._on_controller
        )
        self._outlooks = Outlooks()
        self._waiting = WaitingRoom(max_waiting(size_max_connections(spec, fd_limit)))
        self._closed_peers = ClosedPeers(*split_address(spec.bind))
        self.metrics = RouterMetrics(self.snapshot)

    def __repr__(self) -> str:
        return f"<Router replicas={len(self.replicas.replicas)} {self.dispatcher!r} {self.keeper!r}>"

    async def run(self, stop: asyncio.Event) -> None:
        """Serve until `stop` is set; then refuse what is held and let go of HAProxy."""
        servers = await self._listen()
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [
                    group.create_task(self.keeper.run()),
                    group.create_task(self.keys.run()),
                    group.create_task(self.admin_keys.run()),
                    group.create_task(self._controller.run()),
                    group.create_task(self._tick_for_ever()),
                ]
                if self.certificate is not None:
                    tasks.append(group.create_task(self.certificate.run()))
                await stop.wait()
                for server in servers:
                    server.close()
                self.dispatcher.refuse_all("The gateway is stopping.")
                await asyncio.sleep(0)  # let the answers leave before the connections close
                self.agent.close()
                for task in tasks:
                    task.cancel()
        finally:
            for server in servers:
                server.close()
            self._closed_peers.close()
            self.recorder.flush()
            self._request_log.close()
            _unlink(self._sockets())

    def demand(self) -> Demand:
        """Return what the controller must know."""
        replicas = [
            ReplicaView(replica.replica_id, replica.num_in_flight, replica.is_serving)
            for replica in self.replicas.replicas.values()
        ]
        now_s = self._clock.now_s()
        return Demand(
            router_id=self._spec.gateway_id,
            pid=os.getpid(),
            node_address=self._spec.node,
            endpoints=self.dispatcher.demand(now_s),
            replicas=replicas,
            tenants=self.dispatcher.tenant_demands(now_s),
            certificate_problem=self.certificate.problem if self.certificate is not None else "",
            versions=self.dispatcher.version_demands(),
        )

    def snapshot(self) -> RouterSnapshot:
        """Return what the metrics show."""
        self.recorder.hand_out()
        totals = {
            "lost_completions": self.dispatcher.num_lost_completions,
            "unseen_completions": self.dispatcher.num_unseen_completions,
            "answered_by_haproxy": self._num_answered_by_haproxy,
            "ignored_reports": self.replicas.num_ignored_reports,
            "ignored_ends": self.replicas.num_ignored_ends + self.dispatcher.num_ignored_finishes,
            "ignored_completions": self._completions.num_ignored,
            "spoe_errors": self.agent.num_protocol_errors,
            "haproxy_failures": self.keeper.num_failures + self.keys.num_failures,
            "haproxy_reloads": self.keeper.num_reloads,
            "incomplete_records": self.recorder.num_incomplete,
            "dropped_log_lines": self._request_log.num_dropped,
        }
        return RouterSnapshot(self.demand(), totals, self.statistics)

    # ---- sockets

    def _sockets(self) -> list[str]:
        paths = self._paths
        return [paths.spoe_socket, paths.router_socket, paths.completions_socket, paths.metrics_socket]

    async def _listen(self) -> list[asyncio.Server]:
        loop = asyncio.get_running_loop()
        spoe, reports, completions, metrics = (bind_private_socket(path) for path in self._sockets())
        return [
            await loop.create_unix_server(self.agent.make_connection, sock=spoe, backlog=BACKLOG),
            await loop.create_unix_server(self._make_report_connection, sock=reports, backlog=BACKLOG),
            await loop.create_unix_server(
                lambda: CompletionConnection(self._on_completion, self._completions), sock=completions
            ),
            await serve_metrics(self.metrics.exposition, metrics),
        ]

    def _make_report_connection(self) -> ReportConnection:
        members = self.membership
        return ReportConnection(members.take_report, members.connection_lost, members.ignore)

    # ---- HAProxy asks

    def _on_notify(self, call: SpoeCall, name: bytes, arguments: Arguments) -> None:
        request_id = text_argument(arguments, b"id")
        endpoint = endpoint_of_backend(text_argument(arguments, b"endpoint"))
        if name != b"decide" or not request_id or endpoint is None:
            raise ProtocolError(f"SPOE message {name!r} without id or endpoint")

        now_s = self._clock.now_s()
        pass_name = text_argument(arguments, b"pass")
        waiting = self._waiting.get(request_id)
        if waiting is not None and not waiting.is_rejoined:
            self._rejoin(waiting, call, request_id, endpoint, pass_name)
            return
        tenant = text_argument(arguments, b"tenant")
        path, adapter = text_argument(arguments, b"path"), self._adapter(endpoint, arguments)
        if self.dispatcher.knows(request_id):  # its line may be written: HAProxy's log overtook this pass
            self.recorder.parked(request_id, now_s)
        else:
            self.recorder.arrived(request_id, endpoint, tenant, path, now_s, adapter)
        client = (arguments.get(b"client"), arguments.get(b"client_port"))
        head, size = arguments.get(b"head"), arguments.get(b"size")
        prompt = read_prompt(
            head if isinstance(head, bytes) else b"",
            size if isinstance(size, int) else 0,
            prompt_salt(tenant, adapter),
            text_argument(arguments, b"session"),
        )
        relays = arguments.get(b"relays")
        can_park = prompt.is_stream and isinstance(relays, int) and relays > 0
        waiting = Waiting(
            lambda decision: self._tell(call, request_id, endpoint, decision, prompt),
            (lambda: self._park(call, request_id, endpoint)) if can_park else None,
        )
        arrival = Arrival(
            request_id,
            endpoint,
            waiting.decide,
            call.connection,
            client,
            tenant=tenant,
            prompt=prompt,
            wants_route=arguments.get(b"explain") is True,
            pass_name=pass_name,
        )
        if self.dispatcher.arrive(arrival, now_s):
            tell_after_s = self.dispatcher.endpoints[endpoint].rule.tell_after_s
            self._waiting.held(request_id, waiting, now_s + (tell_after_s or math.inf))
            self._controller.send_soon()

    def _adapter(self, endpoint: str, arguments: Arguments) -> str:
        """Return the adapter that was asked for; empty: the endpoint's model itself."""
        model = text_argument(arguments, b"model")  # told only where there are adapters
        state = self.dispatcher.endpoints.get(endpoint) if model else None
        return model if state is not None and model in state.rule.adapters else ""

    def _tell(
        self, call: SpoeCall, request_id: str, endpoint: str, decision: Bound | Refused, prompt: PromptHead
    ) -> None:
        now_s = self._clock.now_s()
        self.recorder.answered(request_id, decision, now_s)
        if isinstance(decision, Bound):
            is_shared = prompt.is_short_stream and self._speaks_h2(decision)
            call.answer(self._answers.bound(decision, is_shared=is_shared))
        else:
            call.answer(refusal(self._outlooks.complete(decision, endpoint, now_s)))

    def _park(self, call: SpoeCall, request_id: str, endpoint: str) -> None:
        """Let a held stream wait in the relay, which tells its client so. It keeps its place."""
        now_s = self._clock.now_s()
        self.dispatcher.passes.own(request_id, None)
        self.recorder.parked(request_id, now_s)
        call.answer(parked(endpoint, self._outlooks.eta_s(endpoint, now_s)))

    def _rejoin(
        self, waiting: Waiting, call: SpoeCall, request_id: str, endpoint: str, pass_name: str
    ) -> None:
        """A parked stream came again, from the relay."""
        self.dispatcher.passes.own(request_id, call.connection, pass_name)
        waiting.rejoin(lambda decision: self._tell(call, request_id, endpoint, decision, PromptHead()))

    def _on_record(self, record: RequestRecord) -> None:
        self.statistics.observe(record)
        self._request_log.write(record)

    def _speaks_h2(self, decision: Bound) -> bool:
        """Whether HAProxy reaches the replica over HTTP/2, too."""
        replica = self.replicas.replicas.get(decision.front_id or decision.replica_id)
        return replica is not None and replica.is_shared_serving

    def _on_spoe_lost(self, connection: SpoeConnection) -> None:
        self.dispatcher.owner_lost(connection, self._clock.now_s())

    def _on_completion(self, completion: Completion) -> None:
        endpoint = endpoint_of_backend(completion.backend)
        if not completion.is_end:
            self.dispatcher.passes.refused(completion.id, completion.refused, self._clock.now_s())
            return
        if completion.backend == RELAY_BACKEND:
            waiting = self._waiting.leave(completion.id)
            if waiting is not None and not waiting.is_rejoined and not self.dispatcher.is_held(completion.id):
                # Bound, but the relay never sent it again: it died, or its client left at that moment.
                self.dispatcher.passes.abandon(completion.id, self._clock.now_s())
            # The first pass ended. The second has the same id and a line of its own, unless it is held, which
            # ends here, or never came: then the relay refused the request.
            self.dispatcher.client_left(completion.id, self._clock.now_s())
            self.dispatcher.passes.first_ended(completion.id, self._clock.now_s())
            if 200 <= completion.status < 400 or self.dispatcher.knows(completion.id):
                return
        if endpoint is None:
            self._num_answered_by_haproxy += 1
            self.recorder.answered_by_haproxy(completion)
        else:
            self.dispatcher.complete(completion.id, endpoint, classify(completion))
            self.recorder.completed(completion)
            self.dispatcher.pump(endpoint, self._clock.now_s())

    # ---- time passes, the controller speaks

    async def _tick_for_ever(self) -> None:
        while True:
            now_s = self._clock.now_s()
            self.membership.expire(now_s)
            self.dispatcher.tick(now_s)
            self.recorder.tick(now_s)
            while self.recorder.hand_out(RECORDS_AT_A_TIME):  # noqa: ASYNC110, decisions come between
                await asyncio.sleep(0)
            self._waiting.sweep(now_s, self.dispatcher.is_open)
            for waiting in self._waiting.due(now_s, self.dispatcher.is_held):
                waiting.park()
            if self.dispatcher.num_held:
                self.dispatcher.clients_left(self._closed_peers.find(), self._clock.now_s())
            await asyncio.sleep(TICK_S)

    def _on_controller(self, message: GatewaySpec | Outlook) -> None:
        if isinstance(message, Outlook):
            self._outlooks.take(message.endpoints, self._clock.now_s())
        else:
            self._on_spec(message)

    def _on_spec(self, spec: GatewaySpec) -> None:
        spec = localized(spec, self._spec.run_dir, self._spec.node)
        if spec == self._spec:
            return
        if (spec.run_dir, spec.gateway_id) != (self._spec.run_dir, self._spec.gateway_id):
            logger.error("gateway spec refused: its directory and id cannot change while running")
            return
        try:
            self.keeper.set_spec(spec)  # takes effect in a later turn: the keys' file is written by then
            self.keys.want(spec.keys, bool(spec.tenants))
            self.admin_keys.want(admin_keys(spec), bool(spec.admin_bind))
        except ConfigError as error:
            logger.error("gateway spec refused: %s", error)
            return
        self._spec = spec
        self._closed_peers.watch(*split_address(spec.bind))
        self.dispatcher.set_tenants(spec.tenants, self._clock.now_s())
        self.membership.set_rules(spec.endpoints)


def _certificate_keeper(
    spec: GatewaySpec, paths: GatewayPaths, runtime: HaproxyRuntime, clock: Clock
) -> CertificateKeeper | None:
    if not spec.certificate:
        return None
    pair = spec.certificate, spec.certificate_key
    return CertificateKeeper(*pair, paths.certificate, runtime, clock)


def _unlink(paths: Iterable[str]) -> None:
    for path in paths:
        Path(path).unlink(missing_ok=True)
