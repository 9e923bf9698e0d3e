"""The front of a simulated replica: the real engine client, stream keeper, guests, standby and departure.

Stands for `replica.front`, and for the HTTP and text around it, which a simulation has not. Must not know
what gateways decide.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from headrace.api.messages import (
    LeaveBy,
    ReplicaSpec,
    SetSleep,
    Siblings,
    TerminalState,
)
from headrace.api.run_paths import CONTROLLER_SOCKET, front_socket_path, peer_socket_path
from headrace.errors import Overloaded
from headrace.observability.front_metrics import FrontMetrics
from headrace.policy.resumption import Limits
from headrace.replica.departure import Departure
from headrace.replica.ledger import Ledger, RequestRecord
from headrace.replica.peer_link import PeerPool
from headrace.replica.peer_server import PeerServer
from headrace.replica.prefix_digest import PrefixDigest
from headrace.replica.prompt_caching import PromptCaching
from headrace.replica.report import Listeners
from headrace.replica.resumption import EngineStreams, StreamKeeper
from headrace.replica.self_view import FrontTraits, SelfView
from headrace.replica.standby import Standby
from headrace.sim.engine_link import EngineLink
from headrace.sim.engines import EngineBehaviour
from headrace.sim.http import HttpError, HttpRequest
from headrace.sim.machine import Host, Process, Registry
from headrace.sim.network import End, Weather
from headrace.sim.process_loop import Pipe, ProcessLoop
from headrace.sim.reporting import ReportSink
from headrace.sim.streams import FrontStream

POLL_S = 0.01
LAST_REPORTS_S = 0.5
ENGINE_STOP_S = 2.0
PATH = "/v1/chat/completions"


class Silent:
    """A request log that nobody reads."""

    def write(self, fields: dict[str, Any]) -> None:
        pass


class FrontProcess(Process):
    """One front process, started with the spec that the controller made."""

    def __init__(
        self,
        registry: Registry,
        host: Host,
        spec: ReplicaSpec,
        weather: Weather,
        behaviour: EngineBehaviour,
        busy_interval_s: float,
    ) -> None:
        super().__init__(registry, spec.replica_id, host)
        self.process_loop = ProcessLoop(self)
        self.loop = self.process_loop.as_loop()
        self.process_loop.weather = weather
        self.spec = spec
        self.weather = weather
        self.metrics = FrontMetrics(spec.endpoint, spec.replica_id)
        traits = FrontTraits(self.pid, 0, speaks_h2=False, busy_interval_s=busy_interval_s)
        self.view = SelfView(spec, self, self.metrics, traits)
        self.digest = PrefixDigest()
        self.reporter: Listeners[ReportSink] = Listeners([])
        self.caching = PromptCaching(spec.endpoint, self.digest)
        self.ledger = Ledger(self.metrics, Silent(), host, self.reporter)
        self.streams: dict[FrontStream, None] = {}
        self.engine = EngineLink(
            self,
            weather,
            spec.engine,
            behaviour,
            self.digest,
            self.reporter.notify,
            lambda: self.keeper.are_others_catching_up(),
        )
        self.peers = PeerPool(host)
        limits = Limits(spec.resume_attempts, spec.resume_limit_s)
        self.keeper: StreamKeeper = StreamKeeper(
            self.engine, self.peers, self.view.own_engine, limits, self.metrics, host
        )
        self.guests = PeerServer(self.engine, self.view.why_no_guest, self.reporter.notify)
        streams = EngineStreams(self.engine, self.keeper, lambda: 0)
        self.standby = Standby(
            self.engine,
            streams,
            lambda: self.reporter.ask_release(self.view.next_sequence),
            self.reporter.is_released,
            self.reporter.notify,
        )
        self.departure = Departure(host, self.reporter, streams, spec.handover_after_s, spec.drain_grace_s)
        self.sleep_wish = 0
        """What the controller or the user asked for last."""
        self.is_closed = False
        self._is_leaving = False
        self._has_model = False

    def begin(self) -> None:
        """What the program does first."""
        self.after(self.random.uniform(0.1, 0.6), self._listen, "front start")

    def _listen(self) -> None:
        view, spec = self.view, self.spec
        view.address = f"127.0.0.1:{20_000 + self.pid}"
        view.socket_path = front_socket_path(spec.run_dir, spec.replica_id)
        view.peer_path = peer_socket_path(spec.run_dir, spec.replica_id)
        self.listen(view.socket_path)
        self.listen(view.peer_path)
        self.guests.beat()
        for path in spec.report_sockets:
            digest = None if path.endswith(CONTROLLER_SOCKET) else self.digest
            sink = ReportSink(self, self.weather, path, view.make_report, view.report_interval_s, digest)
            sink.on_message = self._on_order
            self.reporter.sinks.append(sink)
        self.engine.start()
        self.after(self.random.uniform(0.05, 0.5), self._load_model, "front start")

    def _load_model(self) -> None:
        self._has_model = True
        self.reporter.notify()

    def has_model(self) -> bool:
        return self._has_model

    # ---- what others ask

    def accept(self, address: str, connection: object) -> None:
        assert isinstance(connection, End)
        if address == self.view.peer_path:
            Pipe(connection, self.guests.make_connection())
        else:
            connection.on_message = lambda message: self._on_request(message, connection)

    def set_sleep(self, level: int) -> None:
        """Wish for a depth of sleep."""
        self.sleep_wish = level
        self.standby.set_level(level)

    def _on_order(self, order: object) -> None:
        """The controller speaks on the connection of the reports."""
        if isinstance(order, SetSleep):
            self.set_sleep(order.level)
        elif isinstance(order, Siblings | LeaveBy):
            self.view.follow(order)

    # ---- requests

    def _on_request(self, request: HttpRequest, end: End) -> None:
        record = RequestRecord(request.request_id, request.request_id, PATH, self.host.now_s())
        record.tenant, record.is_stream = request.tenant, True
        self.ledger.open(record)
        reason = self._why_refused()
        if reason:
            record.finish_reason = "refused"
            self.ledger.close(record, TerminalState.REFUSED)
            end.send(HttpError(503, reason))
            end.close()
            return
        kind = self.spec.engine.kind
        salt = self.caching.salt_of(request.tenant)
        generation = request.question.request(self._free_id(record.request_id), kind, request.tenant, salt)
        record.num_prompt_tokens = len(generation.prompt_token_ids)
        stream = FrontStream(self, record, end, generation)
        self.streams[stream] = None
        self.keeper.submit(generation, stream)
        self.caching.admit(generation, request.question.body())

    def _why_refused(self) -> str:
        if self.is_closed:
            return "this replica is leaving"
        if self.engine.state != "ready" or not self._has_model:
            return f"the engine is {self.engine.state}"
        if self.ledger.num_open > self.spec.max_open:
            return "too many are open"
        return ""

    def _free_id(self, request_id: str) -> str:
        base, attempt = request_id, 1
        while self.keeper.has_request(base):
            attempt += 1
            base = f"{request_id}~{attempt}"
        return base

    def close_stream(self, stream: FrontStream, state: TerminalState) -> None:
        self.streams.pop(stream, None)
        self.ledger.close(stream.record, state)

    def abort_stream(self, stream: FrontStream) -> None:
        self.keeper.abort(stream.request.request_id)

    def stream_lost_engine(self, stream: FrontStream, reason: str) -> None:
        self.keeper.on_engine_lost(stream, reason)

    # ---- the end

    def on_notice(self, left_s: float) -> None:
        """Its machine goes away in so many seconds."""
        self.departure.leave_by_s = self.host.now_s() + left_s
        self.terminate()

    def terminate(self) -> None:
        """SIGTERM."""
        if self._is_leaving:
            return
        self._is_leaving = True
        if self.view.address:
            self.process_loop.create_task(self._leave())
        else:
            self.exit(0)

    async def _leave(self) -> None:
        """Be released, hand over what stays open, free the engine, relay to the end, exit."""
        departure = self.departure
        await self.standby.stop()
        self.reporter.ask_release(self.view.next_sequence)
        await departure.wait_for_release()
        self.is_closed = True
        if await departure.free_engine():
            await self.engine.stop(ENGINE_STOP_S)
            await departure.wait_for_streams(lambda: self.ledger.num_open)
        for stream in list(self.streams):
            stream.fail(Overloaded("this replica is leaving; send the request again", retry_after_s=1.0))
        self.guests.close()
        self.keeper.close()
        self.peers.close()
        await self.engine.stop(ENGINE_STOP_S)
        await self._wait_until(self.reporter.has_told_all, LAST_REPORTS_S)
        self.exit(0)

    async def _wait_until(self, condition: Callable[[], bool], limit_s: float) -> None:
        deadline_s = self.host.now_s() + limit_s
        while not condition() and self.host.now_s() < deadline_s:  # noqa: ASYNC110, as the real front does
            await asyncio.sleep(POLL_S)

    def died(self, code: int) -> None:
        """Its engine dies with it."""
        engine = self.engine.child
        if engine is not None:
            engine.kill()

    def check_integrity(self) -> None:
        """Raise AssertionError unless every request is counted, and is where it is said to be."""
        self.view.check_integrity()
        num_open, num_streams = self.ledger.num_open, len(self.streams)
        assert num_open == num_streams, f"{num_open} open in the ledger, {num_streams} streams"
