"""A simulated durable front, beside a gateway: the real remote engine, stream keeper, departure and view.

Stands for `replica.durable_front`. Must not know what gateways decide, or how replicas compute.
"""

from __future__ import annotations

from headrace.api.messages import GenerationRequest, ReplicaSpec, Siblings, TerminalState
from headrace.api.run_paths import front_socket_path
from headrace.policy.resumption import Limits
from headrace.replica.departure import Departure
from headrace.replica.durable_view import DurableView
from headrace.replica.ledger import RequestRecord
from headrace.replica.local_siblings import local_siblings
from headrace.replica.peer_link import PeerPool
from headrace.replica.prompt_caching import PromptCaching
from headrace.replica.remote_engine import NoEngine, RemoteEngine, no_own_engine
from headrace.replica.resumption import StreamKeeper
from headrace.replica.self_view import FrontTraits
from headrace.sim.front_base import LAST_REPORTS_S, ServingFront
from headrace.sim.http import HttpRequest
from headrace.sim.machine import Host, Registry
from headrace.sim.network import End, Weather
from headrace.sim.reporting import ReportSink
from headrace.sim.streams import FrontStream

LAST_MOMENTS_S = 2.0


class DurableFrontProcess(ServingFront):
    """One durable front, started with the spec that the controller made."""

    def __init__(
        self, registry: Registry, host: Host, spec: ReplicaSpec, weather: Weather, busy_interval_s: float
    ) -> None:
        super().__init__(registry, host, spec, weather)
        traits = FrontTraits(self.pid, 0, speaks_h2=False, busy_interval_s=busy_interval_s)
        self.view = DurableView(spec, self, self.metrics, host, traits)
        self.caching = PromptCaching(spec.endpoint, None)
        self.peers = PeerPool(host)
        no_engine = NoEngine()
        limits = Limits(spec.resume_attempts, spec.resume_limit_s)
        self.keeper = StreamKeeper(no_engine, self.peers, no_own_engine, limits, self.metrics, host)
        self.engine = RemoteEngine(spec.engine, self.keeper)
        self.departure = Departure(host, self.reporter, no_engine, 0.0, spec.drain_grace_s)

    def begin(self) -> None:
        """What the program does first."""
        self.after(self.random.uniform(0.1, 0.6), self._listen, "front start")

    def _listen(self) -> None:
        view, spec = self.view, self.spec
        view.address = f"127.0.0.1:{20_000 + self.pid}"
        view.socket_path = front_socket_path(spec.run_dir, spec.replica_id)
        self.listen(view.socket_path)
        for path in spec.report_sockets:
            sink = ReportSink(self, self.weather, path, view.make_report, view.report_interval_s, None)
            sink.on_message = self._on_order
            self.reporter.sinks.append(sink)
        self.after(self.random.uniform(0.05, 0.5), self._load_model, "front start")

    # ---- what others ask

    def accept(self, address: str, connection: object) -> None:
        assert isinstance(connection, End)
        connection.on_message = lambda message: self._on_request(message, connection)

    def _on_order(self, order: object) -> None:
        if isinstance(order, Siblings):
            self.engine.set_siblings(local_siblings(order.siblings, self.spec.run_dir))

    # ---- requests

    def _prepare(self, request: HttpRequest, record: RequestRecord, end: End) -> None:
        if self.is_closed or self.engine.info is not None:
            self._begin(request, record, end)
        else:
            self.num_preparing += 1
            self.process_loop.create_task(self._begin_when_known(request, record, end))

    async def _begin_when_known(self, request: HttpRequest, record: RequestRecord, end: End) -> None:
        await self.engine.wait_known()
        self.num_preparing -= 1
        if end.is_open:
            self._begin(request, record, end)
        else:
            record.finish_reason = "aborted"
            self.ledger.close(record, TerminalState.ABORTED)

    def _why_refused(self) -> str:
        if self.is_closed:
            return "this front is leaving"
        if self.engine.state != "ready" or not self._has_model:
            return "no replica has been ready yet"
        if self.ledger.num_open > self.spec.max_open:
            return "too many are open"
        return ""

    def _marked(
        self, generation: GenerationRequest, record: RequestRecord, request: HttpRequest
    ) -> GenerationRequest:
        [marked] = self.engine.mark([generation], record, request.place, request.question.body())
        return marked

    def _submit(self, generation: GenerationRequest, stream: FrontStream) -> None:
        self.engine.submit(generation, stream)

    def stream_lost_engine(self, stream: FrontStream, reason: str) -> None:
        self.engine.on_engine_lost(stream, reason)

    # ---- the end

    @property
    def is_listening(self) -> bool:
        return bool(self.view.address)

    async def _leave(self) -> None:
        """Be released, let the streams end within the grace, exit."""
        departure = self.departure
        self.reporter.ask_release(self.view.next_sequence)
        await departure.wait_for_release()
        self.is_closed = True
        await departure.wait_for_streams(lambda: self.ledger.num_open)
        self._fail_open()
        await departure.wait_for_last(lambda: self.ledger.num_open == 0, LAST_MOMENTS_S)
        self.keeper.close()
        self.peers.close()
        await self._wait_until(self.reporter.has_told_all, LAST_REPORTS_S)
        self.exit(0)

    def check_integrity(self) -> None:
        """Raise AssertionError unless every request is counted, and is where it is said to be."""
        self.view.check_integrity()
        super().check_integrity()
