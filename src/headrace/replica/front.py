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

from headrace.api.messages import (
    EngineLoad,
    FinishedRequest,
    GenerationRequest,
    LoadReport,
    ReplicaSpec,
    ReplicaState,
    SetSleep,
    Siblings,
)
from headrace.api.openai import ModelCard
from headrace.api.run_paths import front_socket_path, peer_socket_path
from headrace.clock import Clock
from headrace.errors import ModelError
from headrace.observability.front_metrics import FrontMetrics
from headrace.observability.line_log import BackgroundLog
from headrace.policy.resumption import Limits, OwnEngine, guest_room
from headrace.replica.answer import AnswerServices
from headrace.replica.departure import Departure
from headrace.replica.engine_client import EngineClient, EngineTimeLimits
from headrace.replica.generation import Generator
from headrace.replica.grammar_checker import GrammarChecker
from headrace.replica.http_messages import AnswerHeads, HttpLimits
from headrace.replica.http_server import HttpServer
from headrace.replica.ledger import Ledger
from headrace.replica.notice import NoticeWatcher
from headrace.replica.peer_link import PeerPool
from headrace.replica.peer_server import PeerServer
from headrace.replica.prefix_digest import PrefixDigest, PrefixNews
from headrace.replica.prompt_caching import PromptCaching, shared_prefix_tokens
from headrace.replica.report import BUSY_INTERVAL_S, Reporter
from headrace.replica.restart import RestartPolicy
from headrace.replica.resumption import EngineStreams, StreamKeeper
from headrace.replica.routes import Routes
from headrace.replica.standby import Standby
from headrace.replica.stream_class import stream_class_of, text_class_of
from headrace.replica.text_model import PromptEncoder, TextModel, load_text_model

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
            self._on_order,
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
        self._peers = PeerPool(clock)
        limits_of_streams = Limits(spec.resume_attempts, spec.resume_limit_s)
        self._keeper = StreamKeeper(
            self._engine, self._peers, self._own_engine, limits_of_streams, self._metrics, clock
        )
        self._guests = PeerServer(self._engine, self._why_no_guest, self._reporter.notify, self._digest)
        streams = EngineStreams(self._engine, self._keeper, lambda: self._generator.num_preparing)
        self._standby = Standby(
            self._engine,
            streams,
            lambda: self._reporter.ask_release(self._sequence + 1),
            self._reporter.is_released,
            self._reporter.notify,
        )
        self._departure = Departure(clock, self._reporter, streams, spec.handover_after_s, spec.drain_grace_s)
        services = AnswerServices(self._keeper, self._ledger, self._metrics)
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
        self._peer_path = ""
        self._created = int(clock.wall_s())
        self._sequence = 0
        self._stop_requested = asyncio.Event()

    def __repr__(self) -> str:
        return (
            f"Front({self._spec.replica_id} at {self._address}, {self.state()}, {self._ledger.num_open} open)"
        )

    # ---- what others ask

    def state(self) -> ReplicaState:
        if self._departure.has_begun:
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
        metrics.num_guests, metrics.num_hosted = self._guests.num_guests, self._keeper.num_hosted
        metrics.num_stranded = self._keeper.num_waiting
        self._ledger.check_integrity()
        self._guests.check_integrity()
        self._keeper.check_integrity()
        return metrics

    def _make_report(self, finished: list[FinishedRequest], prefixes: PrefixNews) -> LoadReport:
        self._sequence += 1
        spec, engine, state = self._spec, self._engine, self.state()
        placed = self._guests.placed
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
            num_open=self._ledger.num_open + placed.num_requests,
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
            open_by_gateway=_add(self._ledger.open_by_gateway(), placed.by_gateway()),
            open_by_tenant=_add(self._ledger.open_by_tenant(), placed.by_tenant()),
            prefix_epoch=prefixes.epoch,
            prefixes_added=prefixes.added,
            prefixes_removed=prefixes.removed,
            speaks_h2=True,
            peer_socket=self._peer_path,
            stream_class=self._stream_class(),
            num_guests=self._guests.num_guests - placed.num_streams,
            num_hosted=self._keeper.num_hosted,
            leave_by_s=self._departure.left_s(),
            text_class=text_class_of(spec.engine),
        )

    def _report_interval_s(self) -> float:
        is_busy = self._ledger.num_open > 0 or self._guests.num_guests > 0 or self._departure.has_begun
        return BUSY_INTERVAL_S if is_busy else self._spec.lease_s / 3

    # ---- what its parts ask

    def _on_order(self, order: SetSleep | Siblings) -> None:
        if isinstance(order, SetSleep):
            self._standby.set_level(order.level)
        else:
            others = [each for each in order.siblings if each.replica_id != self._spec.replica_id]
            self._keeper.set_siblings(others)

    def _stream_class(self) -> str:
        info = self._engine.info
        return "" if info is None else stream_class_of(self._spec.stream_class, info)

    def _own_engine(self) -> OwnEngine:
        state = self._engine.state
        is_leaving = self._departure.has_begun or self._standby.is_leaving
        return OwnEngine(
            state if state in ("ready", "starting") else "gone", self._stream_class(), is_leaving=is_leaving
        )

    def _why_no_guest(self, guest: GenerationRequest) -> str:
        if (state := self.state()) != "ready":
            return f"this replica is {state}"
        if guest.stream_class != self._stream_class():
            return "this engine computes differently"
        placed = self._guests.placed
        if placed.has(guest.placed):
            return ""
        num_guests = self._guests.num_guests - placed.num_streams
        num_open = self._ledger.num_open + placed.num_requests + num_guests
        if num_open >= guest_room(self._spec.max_open):
            return f"{num_open} requests and guests are here, which is all that it takes"
        return ""

    def _on_notice(self, left_s: float) -> None:
        self._departure.leave_by_s = self._clock.now_s() + left_s
        self._stop_requested.set()

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
        await self._listen_peers()
        _log.info("%s listens on %s", self._spec.replica_id, self._address)
        reporting = asyncio.create_task(self._reporter.run())
        self._engine.start()
        tasks = [reporting, loading := asyncio.create_task(self._load_model())]
        if self._spec.notice_file:
            watcher = NoticeWatcher(self._spec.notice_file, self._clock, self._on_notice)
            tasks.append(asyncio.create_task(watcher.run()))
        try:
            await self._stop_requested.wait()
            await self._leave()
        finally:
            for task in tasks:
                if task is not loading:
                    task.cancel()
            await asyncio.wait(tasks, timeout=_ENGINE_STOP_S)
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

    async def _listen_peers(self) -> None:
        """Offer the engine to siblings. Without this socket they go elsewhere."""
        path = peer_socket_path(self._spec.run_dir, self._spec.replica_id)
        if not path:
            return
        try:
            await self._guests.listen(path)
        except OSError as error:
            _log.warning("cannot listen on %s: %s; this engine takes no guests", path, error)
        else:
            self._peer_path = path

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

    async def _leave(self) -> None:
        """Be released, hand over what stays open, free the engine, relay to the end, exit."""
        departure = self._departure
        await self._standby.stop()
        self._reporter.ask_release(self._sequence + 1)  # a release from an earlier sleep does not count
        await departure.wait_for_release()
        self._generator.is_closed = True
        self._server.close_idle()
        if await departure.free_engine():
            # Its memory is free from here on; what siblings continue goes on through this front.
            await self._engine.stop(_ENGINE_STOP_S)
            await departure.wait_for_streams(lambda: self._ledger.num_open)
        self._generator.fail_open()
        await self._wait_until(lambda: self._ledger.num_open == 0, _ENGINE_STOP_S)
        self._guests.close()
        self._keeper.close()
        self._peers.close()
        await self._engine.stop(_ENGINE_STOP_S)
        await self._server.close()
        await self._wait_until(self._reporter.has_told_all, _LAST_REPORTS_S)
        if self._encoder is not None:
            self._encoder.close()
        if self._grammars is not None:
            await self._grammars.close()

    async def _wait_until(self, condition: Callable[[], bool], limit_s: float) -> None:
        deadline_s = self._clock.now_s() + limit_s
        # Conditions of several owners, at the end only: polling is simpler than an event in each.
        while not condition() and self._clock.now_s() < deadline_s:  # noqa: ASYNC110
            await asyncio.sleep(_POLL_S)


def _add(counts: dict[str, int], others: dict[str, int]) -> dict[str, int]:
    return (
        {name: counts.get(name, 0) + others.get(name, 0) for name in (counts | others)} if others else counts
    )
