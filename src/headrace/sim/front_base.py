"""What simulated fronts have in common: how requests come, end and are counted, and how a front is stopped.

Stands for the HTTP and text around a front, which a simulation has not. Must not know engines, or where
streams are computed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from headrace.api.messages import GenerationRequest, ReplicaSpec, TerminalState
from headrace.errors import Overloaded
from headrace.observability.front_metrics import FrontMetrics
from headrace.replica.departure import Departure
from headrace.replica.ledger import Ledger, RequestRecord
from headrace.replica.prompt_caching import PromptCaching
from headrace.replica.report import Listeners
from headrace.replica.resumption import StreamKeeper
from headrace.sim.http import HttpError, HttpRequest
from headrace.sim.machine import Host, Process, Registry
from headrace.sim.network import End, Weather
from headrace.sim.process_loop import ProcessLoop
from headrace.sim.reporting import ReportSink
from headrace.sim.streams import FrontStream

POLL_S = 0.01
LAST_REPORTS_S = 0.5
PATH = "/v1/chat/completions"


class Silent:
    """A request log that nobody reads."""

    def write(self, fields: dict[str, Any]) -> None:
        pass


class ServingFront(Process):
    """One front process, started with the spec that the controller made."""

    caching: PromptCaching
    departure: Departure
    keeper: StreamKeeper

    def __init__(self, registry: Registry, host: Host, spec: ReplicaSpec, weather: Weather) -> None:
        super().__init__(registry, spec.replica_id, host)
        self.process_loop = ProcessLoop(self)
        self.loop = self.process_loop.as_loop()
        self.process_loop.weather = weather
        self.spec = spec
        self.weather = weather
        self.metrics = FrontMetrics(spec.endpoint, spec.replica_id)
        self.reporter: Listeners[ReportSink] = Listeners([])
        self.ledger = Ledger(self.metrics, Silent(), host, self.reporter)
        self.streams: dict[FrontStream, None] = {}
        self.num_preparing = 0
        self.is_closed = self.has_failed_open = False
        self._is_leaving = False
        self._has_model = False

    def _load_model(self) -> None:
        self._has_model = True
        self.reporter.notify()

    def has_model(self) -> bool:
        return self._has_model

    # ---- requests

    def _on_request(self, request: HttpRequest, end: End) -> None:
        record = RequestRecord(request.request_id, request.request_id, PATH, self.host.now_s())
        record.tenant, record.is_stream = request.tenant, True
        self.ledger.open(record)
        self._prepare(request, record, end)

    def _prepare(self, request: HttpRequest, record: RequestRecord, end: End) -> None:
        """Take a request, at once or later. Between, `num_preparing` counts it."""
        self._begin(request, record, end)

    def _begin(self, request: HttpRequest, record: RequestRecord, end: End) -> None:
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
        generation = self._marked(generation, record, request)
        stream = FrontStream(self, record, end, generation)
        self.streams[stream] = None
        self._submit(generation, stream)
        self.caching.admit(generation, request.question.body())

    def _marked(
        self, generation: GenerationRequest, record: RequestRecord, request: HttpRequest
    ) -> GenerationRequest:
        """Return a request with what its engine's front must know."""
        return generation

    def _submit(self, generation: GenerationRequest, stream: FrontStream) -> None:
        raise NotImplementedError

    def _why_refused(self) -> str:
        """Say why no request is taken now; empty: it is. The request in question is counted as open."""
        raise NotImplementedError

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

    @property
    def is_listening(self) -> bool:
        """It has its sockets."""
        raise NotImplementedError

    def on_notice(self, left_s: float) -> None:
        """Its machine goes away in so many seconds."""
        self.departure.leave_by_s = self.host.now_s() + left_s
        self.terminate()

    def terminate(self) -> None:
        """SIGTERM."""
        if self._is_leaving:
            return
        self._is_leaving = True
        if self.is_listening:
            self.process_loop.create_task(self._leave())
        else:
            self.exit(0)

    async def _leave(self) -> None:
        """Be released, end or hand over what is open, exit."""
        raise NotImplementedError

    def _fail_open(self) -> None:
        self.has_failed_open = True
        for stream in list(self.streams):
            stream.fail(Overloaded("this replica is leaving; send the request again", retry_after_s=1.0))

    async def _wait_until(self, condition: Callable[[], bool], limit_s: float) -> None:
        deadline_s = self.host.now_s() + limit_s
        while not condition() and self.host.now_s() < deadline_s:  # noqa: ASYNC110, as the real front does
            await asyncio.sleep(POLL_S)

    def check_integrity(self) -> None:
        """Raise AssertionError unless every request is counted, and is where it is said to be."""
        num_open, num_streams = self.ledger.num_open, len(self.streams) + self.num_preparing
        assert num_open == num_streams, f"{num_open} open in the ledger, {num_streams} streams"
