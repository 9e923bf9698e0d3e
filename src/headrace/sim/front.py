"""The front of a simulated replica: takes requests, keeps an engine, reports, sleeps, drains, leaves.

Mirrors `replica.front` and its parts on virtual time, with the real ledger, prefix digest and restart
policy. Owns the replica's state. Must not know what gateways decide.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from headrace.api.messages import (
    EngineCommand,
    FinishedRequest,
    LoadReport,
    ReplicaSpec,
    ReplicaState,
    SetSleep,
    Sibling,
    Siblings,
    TerminalState,
)
from headrace.api.run_paths import CONTROLLER_SOCKET, front_socket_path
from headrace.observability.front_metrics import FrontMetrics
from headrace.replica.front import RELEASE_LIMIT_S
from headrace.replica.ledger import Ledger, RequestRecord
from headrace.replica.prefix_digest import PrefixDigest, PrefixNews
from headrace.replica.prompt_caching import PromptCaching
from headrace.sim.engine_link import EngineLink
from headrace.sim.engines import EngineBehaviour
from headrace.sim.http import HttpError, HttpRequest
from headrace.sim.machine import Host, Process, Registry
from headrace.sim.network import End, Weather
from headrace.sim.peers import GuestRoom
from headrace.sim.reporting import ReportSink
from headrace.sim.resuming import Resumer
from headrace.sim.standby import Standby
from headrace.sim.streams import FrontStream

POLL_S = 0.02
NO_ROUTER_WAIT_S = 0.2
LAST_REPORTS_S = 0.5
ENGINE_STOP_S = 2.0


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
        self.spec = spec
        self.weather = weather
        self._busy_interval_s = busy_interval_s
        self.metrics = FrontMetrics(spec.endpoint, spec.replica_id)
        self.digest = PrefixDigest()
        self.caching = PromptCaching(spec.endpoint, self.digest)
        self.ledger = Ledger(self.metrics, Silent(), host, self)
        self.streams: dict[FrontStream, None] = {}
        self.engine = EngineLink(self, weather, spec.engine, behaviour, self.digest, self.engine_changed)
        self.guests = GuestRoom(self)
        self.resumer = Resumer(self)
        self.standby = Standby(self)
        self.siblings: list[Sibling] = []
        self.sinks: list[ReportSink] = []
        self.socket_path = front_socket_path(spec.run_dir, spec.replica_id)
        self.address = ""
        self.is_draining = False
        self.is_closed = False
        self._sequence = 0
        self._has_model = False

    def begin(self) -> None:
        """What the program does first."""
        self.after(self.random.uniform(0.1, 0.6), self._listen, "front start")

    def _listen(self) -> None:
        self.address = f"127.0.0.1:{20_000 + self.pid}"
        self.listen(self.socket_path)
        self.listen(self.guests.address)
        for path in self.spec.report_sockets:
            digest = None if path.endswith(CONTROLLER_SOCKET) else self.digest
            sink = ReportSink(self, self.weather, path, self._make_report, self._interval_s, digest)
            sink.on_message = self._on_word
            self.sinks.append(sink)
        self.engine.start()
        self.after(self.random.uniform(0.05, 0.5), self._load_model, "front start")

    def _load_model(self) -> None:
        self._has_model = True
        self.engine_changed()

    # ---- what others ask

    def state(self) -> ReplicaState:
        if self.is_draining:
            return "draining"
        if self.engine.state == "failed":
            return "failed"
        if self.engine.state == "asleep" or (self.standby.is_leaving and self.engine.state == "ready"):
            return "standby"
        return "ready" if self.engine.state == "ready" and self._has_model else "starting"

    def accept(self, address: str, connection: object) -> None:
        assert isinstance(connection, End)
        if address == self.guests.address:
            self.guests.accept(connection)
        else:
            connection.on_message = lambda message: self._on_request(message, connection)

    def _on_word(self, message: object) -> None:
        """The controller speaks on the connection of the reports."""
        if isinstance(message, SetSleep):
            self.standby.set_level(message.level)
        elif isinstance(message, Siblings):
            self.siblings = message.siblings
            self.resumer.on_news()

    # ---- requests

    def _on_request(self, request: HttpRequest, end: End) -> None:
        record = RequestRecord(request.request_id, request.request_id, "/v1/chat/completions", 0.0)
        record.arrived_s, record.tenant, record.is_stream = self.host.now_s(), request.tenant, True
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
        stream = FrontStream(self, record, request, end, generation)
        self.streams[stream] = None
        stream.take_seat(self.resumer.own_seat, generation.request_id)
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
        while self.engine.has_request(base):
            attempt += 1
            base = f"{request_id}~{attempt}"
        return base

    def close_stream(self, stream: FrontStream, state: TerminalState) -> None:
        self.streams.pop(stream, None)
        self.ledger.close(stream.record, state)

    def stream_lost_engine(self, stream: FrontStream, reason: str) -> None:
        self.resumer.on_lost(stream, reason)

    # ---- reports

    def on_busy(self) -> None:
        """The ledger: the first request is open."""
        self.engine_changed()

    def on_end(self, finished: FinishedRequest) -> None:
        """The ledger: a request ended."""
        for sink in self.sinks:
            sink.tell(finished)

    def engine_changed(self) -> None:
        for sink in self.sinks:
            sink.notify()
        self.resumer.on_news()

    def _interval_s(self) -> float:
        is_busy = self.ledger.num_open > 0 or self.is_draining
        return self._busy_interval_s if is_busy else self.spec.lease_s / 3

    def _make_report(self, finished: list[FinishedRequest], prefixes: PrefixNews) -> LoadReport:
        self._sequence += 1
        spec, engine = self.spec, self.engine
        return LoadReport(
            replica_id=spec.replica_id,
            endpoint=spec.endpoint,
            model=spec.engine.model,
            address=self.address,
            pid=self.pid,
            sequence=self._sequence,
            lease_s=spec.lease_s,
            state=self.state(),
            phase=engine.phase,
            num_open=self.ledger.num_open,
            max_open=spec.max_open,
            engine=engine.load,
            engine_info=engine.info,
            engine_pid=engine.process.pid if engine.process is not None else 0,
            engine_restarts=engine.num_restarts,
            last_error=engine.last_error,
            is_retryable=engine.is_retryable,
            finished=finished,
            generation=spec.generation,
            socket_path=self.socket_path,
            open_by_gateway=self.ledger.open_by_gateway(),
            open_by_tenant=self.ledger.open_by_tenant(),
            prefix_epoch=prefixes.epoch,
            prefixes_added=prefixes.added,
            prefixes_removed=prefixes.removed,
            peer_socket=self.guests.address,
            stream_class=spec.stream_class,
            num_guests=self.guests.num_guests,
            num_hosted=self.resumer.num_hosted,
        )

    def ask_release(self) -> None:
        """From the next report on, every router must release this replica anew."""
        for sink in self.sinks:
            sink.ask_release(self._sequence + 1)

    def is_released(self) -> bool:
        """Whether every connected router will send no more requests."""
        return all(sink.is_released for sink in self.sinks if sink.is_router and sink.is_connected)

    # ---- the end

    def terminate(self) -> None:
        """SIGTERM."""
        if self.is_alive:
            self.run(self._drain)

    def _drain(self) -> None:
        """Leave by the handshake: report it, serve until released, finish what is open, stop the engine."""
        if self.is_draining:
            return
        if not self.address:
            self.exit(0)
            return
        self.is_draining = True
        self.standby.stop()
        since_s = self.host.now_s()
        self.engine_changed()

        def is_released() -> bool:
            if any(sink.is_router and sink.is_connected for sink in self.sinks):
                return self.is_released()
            return self.host.now_s() - since_s > NO_ROUTER_WAIT_S

        self.wait_until(is_released, RELEASE_LIMIT_S, self._close)

    def _close(self) -> None:
        self.is_closed = True
        self.after(self.spec.handover_after_s, self.resumer.hand_over, "handover")
        self.wait_until(lambda: not self.ledger.num_open, self.spec.drain_grace_s, self._fail_open)

    def _fail_open(self) -> None:
        for stream in list(self.streams):
            stream.fail("this replica is leaving", 503)
        self.engine.stop()
        self.wait_until(lambda: self.engine.process is None, 2 * ENGINE_STOP_S, self._tell_last)

    def _tell_last(self) -> None:
        def has_told_all() -> bool:
            return not any(sink.is_connected and sink.has_news() for sink in self.sinks)

        self.wait_until(has_told_all, LAST_REPORTS_S, lambda: self.exit(0))

    def wait_until(self, condition: Callable[[], bool], limit_s: float, then: Callable[[], None]) -> None:
        """Poll, as the real front does at its end, and go on when it is so or the limit is over."""
        deadline_s = self.host.now_s() + limit_s

        def poll() -> None:
            if condition() or self.host.now_s() >= deadline_s:
                then()
            else:
                self.after(POLL_S, poll, "poll")

        poll()

    def died(self, code: int) -> None:
        """Its engine dies with it."""
        engine = self.engine.process
        if engine is not None:
            engine.kill()

    def check_integrity(self) -> None:
        """Raise AssertionError unless every request is counted."""
        self.ledger.check_integrity()
        num_open, num_streams = self.ledger.num_open, len(self.streams)
        assert num_open == num_streams, f"{num_open} open in the ledger, {num_streams} streams"

    def is_sleeping(self) -> bool:
        return self.engine.state == "asleep"


