"""The front of one replica: puts its parts together, and starts, serves and drains.

Owns the process's life and what the replica says about itself. Everything is built here, once.
Must not know how its parts do their work.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass, field

from headrace.api.messages import EngineLoad, FinishedRequest, LoadReport, ReplicaSpec, ReplicaState
from headrace.api.openai import ModelCard
from headrace.api.run_paths import front_socket_path
from headrace.clock import Clock
from headrace.errors import ModelError
from headrace.observability.front_metrics import FrontMetrics
from headrace.observability.line_log import BackgroundLog
from headrace.replica.answer import AnswerServices, FailOnEngineLoss
from headrace.replica.engine_client import EngineClient, EngineTimeLimits
from headrace.replica.generation import Generator
from headrace.replica.grammar_checker import GrammarChecker
from headrace.replica.http_messages import AnswerHeads, HttpLimits
from headrace.replica.http_server import HttpServer
from headrace.replica.ledger import Ledger
from headrace.replica.prefix_digest import PrefixDigest, PrefixNews
from headrace.replica.prompt_caching import PromptCaching, shared_prefix_tokens
from headrace.replica.report import BUSY_INTERVAL_S, Reporter
from headrace.replica.restart import RestartPolicy
from headrace.replica.routes import Routes
from headrace.replica.standby import Standby
from headrace.replica.text_model import PromptEncoder, TextModel, load_text_model

RELEASE_LIMIT_S = 5.0
"""Longest wait for routers to release a draining replica."""
_NO_ROUTER_WAIT_S = 0.2
_POLL_S = 0.01
_ENGINE_STOP_S = 2.0
_LAST_REPORTS_S = 0.5
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class FrontLimits:
    """Time limits that tests shorten."""

    http: HttpLimits = field(default_factory=HttpLimits)
    engine: EngineTimeLimits = field(default_factory=EngineTimeLimits)


class Front:
    """One front process. `run` is its whole life."""

    def __init__(self, spec: ReplicaSpec, clock: Clock, limits: FrontLimits) -> None:
        self._spec = spec
        self._clock = clock
        is_simulated = spec.engine.kind == "simulated"
        self._metrics = FrontMetrics(spec.endpoint, spec.replica_id)
        self._access_log = BackgroundLog(sys.stderr.buffer, "access-log")
        self._digest = PrefixDigest()
        self._reporter = Reporter(
            spec.report_sockets,
            self._make_report,
            self._report_interval_s,
            self._digest,
            lambda level: self._standby.set_level(level),
        )
        self._ledger = Ledger(self._metrics, self._access_log, clock, self._reporter)
        self._engine = EngineClient(
            spec.engine,
            f"headrace: engine {spec.replica_id}",
            clock,
            self._reporter.notify,
            limits.engine,
            RestartPolicy(),
            self._digest,
        )
        self._standby = Standby(
            self._engine,
            lambda: self._ledger.num_open,
            lambda: self._reporter.ask_release(self._sequence + 1),
            self._reporter.is_released,
            self._reporter.notify,
        )
        services = AnswerServices(self._engine, self._ledger, self._metrics, FailOnEngineLoss())
        fingerprint = "headrace-simulated" if is_simulated else "headrace-native"
        self._generator = Generator(spec.endpoint, spec.max_open, fingerprint, services, self._engine, clock)
        self._routes = Routes(self, self._generator, self._metrics, spec.needs_gateway)
        headers = f"x-headrace-replica: {spec.replica_id}\r\n"
        headers += "x-headrace-engine: simulated\r\n" if is_simulated else ""
        heads = AnswerHeads(headers, clock.wall_s)
        self._server = HttpServer(self._routes.handle, limits.http, heads, clock)
        self._encoder: PromptEncoder | None = None
        self._grammars = None if is_simulated else GrammarChecker(f"headrace: grammars {spec.replica_id}")
        self._address = ""
        self._socket_path = ""
        self._created = int(clock.wall_s())
        self._sequence = 0
        self._is_draining = False
        self._draining_since_s = 0.0
        self._stop_requested = asyncio.Event()

    def __repr__(self) -> str:
        return (
            f"Front({self._spec.replica_id} at {self._address}, {self.state()}, {self._ledger.num_open} open)"
        )

    # ---- what others ask

    def state(self) -> ReplicaState:
        if self._is_draining:
            return "draining"
        if self._engine.state == "failed":
            return "failed"
        if self._engine.state == "asleep" or (self._standby.is_leaving and self._engine.state == "ready"):
            return "standby"
        is_ready = self._engine.state == "ready" and self._generator.has_model()
        return "ready" if is_ready else "starting"

    def why_not_ready(self) -> str:
        state = self.state()
        if state == "ready":
            return ""
        if state == "draining":
            return "this replica is leaving"
        if self._standby.is_leaving:
            return "this replica goes on standby; use another one"
        if self._engine.state == "ready":
            return "the model's tokenizer is being loaded"
        return self._engine.why_not_ready()

    def model_card(self) -> ModelCard:
        info = self._engine.info
        limit = None if info is None else info.max_context_tokens
        spec = self._spec
        return ModelCard(spec.endpoint, "model", self._created, "headrace", spec.engine.model, limit)

    def update_metrics(self) -> FrontMetrics:
        metrics = self._metrics
        metrics.num_open = self._ledger.num_open
        metrics.num_engine_restarts = self._engine.num_restarts
        metrics.is_ready = self.state() == "ready"
        metrics.engine_load = self._engine.load or EngineLoad()
        self._ledger.check_integrity()
        return metrics

    def _make_report(self, finished: list[FinishedRequest], prefixes: PrefixNews) -> LoadReport:
        self._sequence += 1
        spec, engine, state = self._spec, self._engine, self.state()
        return LoadReport(
            replica_id=spec.replica_id,
            endpoint=spec.endpoint,
            model=spec.engine.model,
            address=self._address,
            pid=os.getpid(),
            sequence=self._sequence,
            lease_s=spec.lease_s,
            state=state,
            phase=self._standby.error
            if state in ("ready", "standby") and self._standby.error
            else engine.phase,
            num_open=self._ledger.num_open,
            max_open=spec.max_open,
            engine=engine.load,
            engine_info=engine.info,
            engine_pid=engine.pid,
            engine_restarts=engine.num_restarts,
            last_error=engine.last_error,
            is_retryable=engine.is_retryable,
            finished=finished,
            generation=spec.generation,
            socket_path=self._socket_path,
            open_by_gateway=self._ledger.open_by_gateway(),
            open_by_tenant=self._ledger.open_by_tenant(),
            prefix_epoch=prefixes.epoch,
            prefixes_added=prefixes.added,
            prefixes_removed=prefixes.removed,
            speaks_h2=True,
        )

    def _report_interval_s(self) -> float:
        is_busy = self._ledger.num_open > 0 or self._is_draining
        return BUSY_INTERVAL_S if is_busy else self._spec.lease_s / 3

    # ---- life

    async def run(self) -> int:
        """Serve until SIGTERM or SIGINT and drained; return the exit status."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop_requested.set)
        try:
            self._address = await self._server.listen(self._spec.host, self._spec.port)
        except OSError as error:
            where = f"{self._spec.host}:{self._spec.port}"
            print(f"front: cannot listen on {where}: {error.strerror or error}", file=sys.stderr)
            self._access_log.close()
            return 2
        await self._listen_unix()
        if self._spec.needs_gateway and not self._socket_path:
            # Nobody could be served: without the socket there is no telling a gateway from anybody else.
            print(f"front: cannot listen on a UNIX socket in {self._spec.run_dir}", file=sys.stderr)
            self._access_log.close()
            return 2
        _log.info("%s listens on %s", self._spec.replica_id, self._address)
        reporting = asyncio.create_task(self._reporter.run())
        self._engine.start()
        loading = asyncio.create_task(self._load_model())
        try:
            await self._stop_requested.wait()
            await self._drain()
        finally:
            reporting.cancel()
            await asyncio.wait([reporting, loading], timeout=_ENGINE_STOP_S)
            if self._socket_path:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(self._socket_path)
            self._access_log.close()
        return 0

    async def _listen_unix(self) -> None:
        """Serve gateways of this machine on a UNIX socket, too. Without one they use the TCP address."""
        path = front_socket_path(self._spec.run_dir, self._spec.replica_id)
        if not path:
            return
        try:
            await self._server.listen_unix(path)
        except OSError as error:
            _log.warning("cannot listen on %s: %s; gateways use %s", path, error, self._address)
        else:
            self._socket_path = path

    async def _load_model(self) -> None:
        try:
            model: TextModel = await asyncio.to_thread(load_text_model, self._spec.engine)
        except ModelError as error:
            self._engine.fail(str(error))
        except Exception as error:
            _log.exception("the model's tokenizer could not be loaded")
            self._engine.fail(f"the model's tokenizer could not be loaded: {type(error).__name__}: {error}")
        else:
            self._encoder = PromptEncoder(model.tokenizer)
            shared = await shared_prefix_tokens(self._spec.shared_prefix, model, self._encoder)
            caching = PromptCaching(self._spec.endpoint, self._digest, shared)
            self._generator.set_model(model, self._encoder, caching, self._grammars)
            self._reporter.notify()

    async def _drain(self) -> None:
        """Leave by the handshake: report it, serve until released, finish what is open, stop the engine."""
        self._is_draining = True
        await self._standby.stop()
        self._draining_since_s = self._clock.now_s()
        self._reporter.notify()
        await self._wait_until(self._is_released, RELEASE_LIMIT_S)
        self._generator.is_closed = True
        self._server.close_idle()
        await self._wait_until(lambda: self._ledger.num_open == 0, self._spec.drain_grace_s)
        self._generator.fail_open()
        await self._wait_until(lambda: self._ledger.num_open == 0, _ENGINE_STOP_S)
        await self._engine.stop(_ENGINE_STOP_S)
        await self._server.close()
        await self._wait_until(self._reporter.has_told_all, _LAST_REPORTS_S)
        if self._encoder is not None:
            self._encoder.close()
        if self._grammars is not None:
            await self._grammars.close()

    def _is_released(self) -> bool:
        if self._reporter.has_router():
            return self._reporter.is_released()
        return self._clock.now_s() - self._draining_since_s > _NO_ROUTER_WAIT_S

    async def _wait_until(self, condition: Callable[[], bool], limit_s: float) -> None:
        deadline_s = self._clock.now_s() + limit_s
        # Conditions of several owners, at the end only: polling is simpler than an event in each.
        while not condition() and self._clock.now_s() < deadline_s:  # noqa: ASYNC110
            await asyncio.sleep(_POLL_S)
