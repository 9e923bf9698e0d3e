"""A simulated router: the real dispatcher, replica table, server keeper and recorder, in its shell's order.

Mirrors `gateway.router` on virtual time. Owns nothing but the order in which they are called. Must not
decide anything.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Coroutine, Generator, Iterable
from typing import Any

from headrace.api.messages import (
    Demand,
    GatewaySpec,
    Outlook,
    ReplicaView,
    ReportAck,
    TerminalState,
)
from headrace.api.run_paths import CONTROLLER_SOCKET, router_socket_path
from headrace.gateway.arrivals import Arrival, Bound, Refused
from headrace.gateway.completions import Completion, classify
from headrace.gateway.dispatcher import Dispatcher
from headrace.gateway.haproxy_frontend import RELAY_BACKEND
from headrace.gateway.haproxy_runtime import HaproxyRefused, HaproxyRuntime, HaproxyUnavailable, ServerState
from headrace.gateway.membership import Membership
from headrace.gateway.names import endpoint_of_backend
from headrace.gateway.outlooks import Outlooks
from headrace.gateway.placed import localized
from headrace.gateway.replicas import ReplicaTable
from headrace.gateway.request_recorder import RequestRecorder
from headrace.gateway.rounds import RETRY_PERIOD_S
from headrace.gateway.router import DEMAND_PERIOD_S, TICK_S
from headrace.gateway.server import Server
from headrace.gateway.servers import VERIFY_PERIOD_S, ConfigFiles, ServerKeeper
from headrace.gateway.waiting import Waiting, WaitingRoom
from headrace.observability.request_record import RequestRecord
from headrace.policy.prompt import read_prompt
from headrace.sim.haproxy import ConfigOnDisk, HaproxyProcess
from headrace.sim.machine import Host, Process, Registry
from headrace.sim.network import End, Weather, connect
from headrace.sim.passage import Announcement, Parked, Verdict
from headrace.sim.timeline import Timer

MIN_GAP_S = 0.01
PATH = "/v1/chat/completions"
MAX_PARKED = 8
"""Few, so that there are more who would be."""


class _Turn:
    """Where a command to HAProxy lets other things happen."""

    def __await__(self) -> Generator[_Turn, None, None]:
        yield self


class Runtime(HaproxyRuntime):
    """HAProxy's runtime API over a simulated HAProxy: each command takes a moment, and may find it gone."""

    def __init__(self, find: Callable[[], HaproxyProcess | None]) -> None:
        self._find = find

    async def _haproxy(self) -> HaproxyProcess:
        await _Turn()
        haproxy = self._find()
        if haproxy is None or not haproxy.is_alive or haproxy.is_paused:
            raise HaproxyUnavailable("HAProxy does not answer")
        return haproxy

    async def show_servers(self) -> dict[str, ServerState]:
        return (await self._haproxy()).show()

    async def add_server(self, server: Server) -> None:
        haproxy = await self._haproxy()
        if server.path in haproxy.servers:
            raise HaproxyRefused(f"{server.path} is there already")
        haproxy.add(server)

    async def enable_server(self, path: str) -> None:
        haproxy = await self._haproxy()
        if path not in haproxy.servers:
            raise HaproxyRefused(f"no server {path}")
        haproxy.servers[path].is_in_maintenance = False

    async def disable_server(self, path: str) -> None:
        haproxy = await self._haproxy()
        if path not in haproxy.servers:
            raise HaproxyRefused(f"no server {path}")
        haproxy.servers[path].is_in_maintenance = True

    async def delete_server(self, path: str) -> bool:
        return (await self._haproxy()).delete(path)

    async def reload(self) -> None:
        await self._haproxy()


class _Disk(ConfigFiles):
    """haproxy.cfg without a file."""

    def __init__(self, disk: ConfigOnDisk) -> None:
        self._disk = disk

    def write(self, spec: GatewaySpec, servers: Iterable[Server], fd_limit: int) -> None:
        self._disk.servers = list(servers)


class _Keeper(ServerKeeper):
    """The real keeper, whose rounds begin on virtual time."""

    on_want: Callable[[], None]

    def want(self, servers: Iterable[Server], known: Iterable[str]) -> None:
        super().want(servers, known)
        self.on_want()


class _Reports:
    """The connection that a front reports over."""

    def __init__(self, end: End) -> None:
        self._end = end

    def acknowledge(self, ack: ReportAck) -> None:
        self._end.send(ack)


class RouterProcess(Process):
    """One router process."""

    def __init__(
        self,
        registry: Registry,
        host: Host,
        spec: GatewaySpec,
        weather: Weather,
        disk: ConfigOnDisk,
        find_haproxy: Callable[[], HaproxyProcess | None],
    ) -> None:
        super().__init__(registry, f"router-{spec.gateway_id}", host)
        self.spec = spec
        self.gateway = spec.gateway_id
        self._weather = weather
        self._find_haproxy = find_haproxy
        # HTTP/2 is a second server for the same replica; the simulated HAProxy needs one.
        self.replicas = ReplicaTable(spec.run_dir, spec.gateway_id, uses_h2=False)
        self.records: dict[str, int] = {}
        """Lines of the request log by request id."""
        self.told_tokens: dict[str, int | None] = {}
        """What the lines of finished ones say of the output, by request id."""
        self.last_record = ""
        self.recorder = RequestRecorder(spec.gateway_id, host, self._on_record)
        self.dispatcher = Dispatcher(spec.endpoints, self.replicas, self.recorder, spec.tenants)
        self.ticked_s = -math.inf
        """When it last ticked, by its own clock."""
        self.waiting = WaitingRoom(MAX_PARKED)
        self.membership = Membership(self.replicas, self.dispatcher, self.recorder, host.now_s)
        self.keeper = _Keeper(
            spec, 20_000, Runtime(find_haproxy), self.membership.servers_changed, _Disk(disk), host.now_s
        )
        self.keeper.on_want = self._want_round
        self.membership.keeper = self.keeper
        self._round: Coroutine[Any, Any, bool] | None = None
        self._next_round: Timer | None = None
        self._is_round_wanted = False
        self.outlooks = Outlooks()
        self._controller: End | None = None
        self._demand_timer: Timer | None = None
        self._demand_sent_s = -1.0
        base = f"{spec.run_dir}/{spec.gateway_id}"
        self._spoe_address, self._log_address = f"{base}/spoe.sock", f"{base}/log.sock"
        self._report_address = router_socket_path(spec.run_dir, spec.gateway_id)
        self.membership.set_rules(spec.endpoints)
        self.num_bound = 0
        self.num_parked = 0

    def begin(self) -> None:
        self.after(self.random.uniform(0.1, 0.8), self._start, "router start")

    def _start(self) -> None:
        for address in (self._spoe_address, self._log_address, self._report_address):
            self.listen(address)
        self._connect_controller()
        self._begin_round()
        self._tick()

    def terminate(self) -> None:
        if not self.is_paused:
            self.dispatcher.refuse_all("The gateway is stopping.")
        self.exit(0)

    def accept(self, address: str, connection: object) -> None:
        assert isinstance(connection, End)
        end = connection
        if address == self._spoe_address:
            end.on_message = lambda message: self._on_announcement(message, end)
            end.on_close = lambda: self.dispatcher.owner_lost(end, self.host.now_s())
        elif address == self._log_address:
            end.on_message = self._on_completion
        else:
            reports = _Reports(end)
            end.on_message = lambda message: self.membership.take_report(reports, message)
            end.on_close = lambda: self.membership.connection_lost(reports)

    # ---- HAProxy asks

    def _on_announcement(self, message: Announcement, end: End) -> None:
        now_s = self.host.now_s()
        request, call = message.request, message.call
        request_id = request.request_id
        parked = self.waiting.get(request_id)
        if parked is not None and not parked.is_rejoined:
            self.dispatcher.passes.own(request_id, end, request.pass_name)
            parked.rejoin(lambda decision: self._tell(end, call, request_id, decision))
            return
        if self.dispatcher.knows(request_id):
            self.recorder.parked(request_id, now_s)
        else:
            self.recorder.arrived(request_id, request.endpoint, request.tenant, PATH, now_s)
        body = request.question.body()
        waiting = Waiting(
            lambda decision: self._tell(end, call, request_id, decision),
            (lambda: self._park(end, call, request_id)) if message.can_park else None,
        )
        arrival = Arrival(
            request_id,
            request.endpoint,
            waiting.decide,
            end,
            request_id,
            tenant=request.tenant,
            prompt=read_prompt(body, len(body), request.tenant, request.question.session),
            pass_name=request.pass_name,
        )
        if self.dispatcher.arrive(arrival, now_s):
            tell_after_s = self.dispatcher.endpoints[request.endpoint].rule.tell_after_s
            self.waiting.held(request_id, waiting, now_s + (tell_after_s or math.inf))
            self._send_demand_soon()

    def _tell(self, end: End, call: int, request_id: str, decision: Bound | Refused) -> None:
        self.recorder.answered(request_id, decision, self.host.now_s())
        self.num_bound += isinstance(decision, Bound)
        end.send(Verdict(call, decision))

    def _park(self, end: End, call: int, request_id: str) -> None:
        self.num_parked += 1
        self.dispatcher.passes.own(request_id, None)
        self.recorder.parked(request_id, self.host.now_s())
        end.send(Verdict(call, Parked()))

    def _on_completion(self, line: Completion) -> None:
        endpoint = endpoint_of_backend(line.backend)
        if not line.is_end:
            self.dispatcher.passes.refused(line.id, line.refused, self.host.now_s())
            return
        if line.backend == RELAY_BACKEND:
            waiting = self.waiting.leave(line.id)
            if waiting is not None and not waiting.is_rejoined and not self.dispatcher.is_held(line.id):
                self.dispatcher.passes.abandon(line.id, self.host.now_s())
            self.dispatcher.client_left(line.id, self.host.now_s())
            self.dispatcher.passes.first_ended(line.id, self.host.now_s())
            if 200 <= line.status < 400 or self.dispatcher.knows(line.id):
                return
        if endpoint is None:
            self.recorder.answered_by_haproxy(line)
            return
        self.dispatcher.complete(line.id, endpoint, classify(line))
        self.recorder.completed(line)
        self.dispatcher.pump(endpoint, self.host.now_s())

    def _on_record(self, record: RequestRecord) -> None:
        self.last_record = record.id
        self.records[record.id] = self.records.get(record.id, 0) + 1
        if record.state == TerminalState.FINISHED.value:
            self.told_tokens[record.id] = record.output_tokens

    # ---- the keeper's rounds: the real coroutine, one command to HAProxy at a time

    def _want_round(self) -> None:
        if self._round is not None:
            self._is_round_wanted = True
        elif self._next_round is not None:
            self._next_round.cancel()
            self._next_round = self.after(0.0, self._begin_round, "keeper round")

    def _begin_round(self) -> None:
        self._next_round = None
        self._is_round_wanted = False
        self._round = self.keeper.run_round()
        self._go_on_with_round()

    def _go_on_with_round(self) -> None:
        assert self._round is not None
        try:
            self._round.send(None)
        except StopIteration as stop:
            self._round = None
            period_s = VERIFY_PERIOD_S if stop.value else RETRY_PERIOD_S
            delay_s = 0.0 if self._is_round_wanted else period_s
            self._next_round = self.after(delay_s, self._begin_round, "keeper round")
        else:
            self.after(self.random.uniform(0.0003, 0.004), self._go_on_with_round, "keeper command")

    def died(self, code: int) -> None:
        if self._round is not None:
            self._round.close()

    # ---- time passes, the controller speaks

    def _tick(self) -> None:
        self.after(TICK_S, self._tick, "router tick")
        now_s = self.host.now_s()
        self.membership.expire(now_s)
        self.dispatcher.tick(now_s)
        self.ticked_s = now_s
        self.recorder.tick(now_s)
        self.recorder.hand_out()
        self.waiting.sweep(now_s, self.dispatcher.is_open)
        for waiting in self.waiting.due(now_s, self.dispatcher.is_held):
            waiting.park()
        haproxy = self._find_haproxy()
        if self.dispatcher.num_held and haproxy is not None and haproxy.closed_clients:
            self.dispatcher.clients_left(frozenset(haproxy.closed_clients), now_s)

    def _connect_controller(self) -> None:
        address = f"{self.spec.run_dir}/{CONTROLLER_SOCKET}"
        connect(self, self._weather, address, self._on_controller, self._on_no_controller)

    def _on_no_controller(self) -> None:
        self.after(0.2, self._connect_controller, "router retry")

    def _on_controller(self, end: End) -> None:
        self._controller = end
        end.on_message = self._on_word
        end.on_close = self._on_controller_lost
        self._send_demand()

    def _on_controller_lost(self) -> None:
        self._controller = None
        self.after(0.05, self._connect_controller, "router retry")

    def _send_demand_soon(self) -> None:
        if self._controller is not None and self._demand_timer is not None:
            self._demand_timer.cancel()
            delay_s = max(0.0, self._demand_sent_s + MIN_GAP_S - self.timeline.now_s)
            self._demand_timer = self.after(delay_s, self._send_demand, "demand")

    def _send_demand(self) -> None:
        if self._demand_timer is not None:
            self._demand_timer.cancel()
        self._demand_timer = self.after(DEMAND_PERIOD_S, self._send_demand, "demand")
        if self._controller is not None:
            self._demand_sent_s = self.timeline.now_s
            self._controller.send(self.demand())

    def demand(self) -> Demand:
        """What the controller must know."""
        now_s = self.host.now_s()
        replicas = [
            ReplicaView(replica.replica_id, replica.num_in_flight, replica.is_serving)
            for replica in self.replicas.replicas.values()
        ]
        return Demand(
            router_id=self.gateway,
            pid=self.pid,
            node_address=self.spec.node,
            endpoints=self.dispatcher.demand(now_s),
            replicas=replicas,
            tenants=self.dispatcher.tenant_demands(now_s),
            versions=self.dispatcher.version_demands(),
        )

    def _on_word(self, message: object) -> None:
        if isinstance(message, Outlook):
            self.outlooks.take(message.endpoints, self.host.now_s())
        elif isinstance(message, GatewaySpec):
            spec = localized(message, self.spec.run_dir, self.spec.node)
            if spec != self.spec:
                self.spec = spec
                self.dispatcher.set_tenants(spec.tenants, self.host.now_s())
                self.membership.set_rules(spec.endpoints)

    def num_ended(self) -> dict[TerminalState, int]:
        """Requests by end, of all endpoints."""
        totals = dict.fromkeys(TerminalState, 0)
        for endpoint in self.dispatcher.endpoints.values():
            for state, count in endpoint.ended.items():
                totals[state] += count
        return totals
