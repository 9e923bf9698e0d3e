"""The life of a front's process, whichever kind of front it is.

Owns its sockets for clients, signals, notices, the loading of the model's text, and the end.

Must not know engines. What a kind of front does when it starts and when it leaves, it does itself (`Living`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
from dataclasses import dataclass
from typing import Protocol

from headrace.api.messages import ReplicaSpec
from headrace.api.run_paths import front_socket_path
from headrace.clock import Clock
from headrace.errors import ConfigError, ModelError
from headrace.observability.line_log import BackgroundLog
from headrace.replica.departure import Departure
from headrace.replica.generation import Generator
from headrace.replica.grammar_checker import GrammarChecker
from headrace.replica.http_server import HttpServer
from headrace.replica.notice import NoticeWatcher
from headrace.replica.notice_url import notice_sources
from headrace.replica.prefix_digest import PrefixDigest
from headrace.replica.prompt_caching import PromptCaching, shared_prefix_tokens
from headrace.replica.report import Reporter
from headrace.replica.text_model import PromptEncoder, TextModel, load_text_model

LAST_MOMENTS_S = 2.0
"""For what is still running when everything has ended."""
_log = logging.getLogger(__name__)


class Addressed(Protocol):
    """What tells others where the front listens; empty until it does."""

    address: str
    socket_path: str


class Living(Protocol):
    """What the kinds of fronts do differently."""

    async def listen(self) -> None:
        """Open the sockets that it has besides, and check those that it must have. Raises OSError and
        ConfigError."""
        ...

    def start(self) -> None:
        """Begin what needs a running loop."""
        ...

    def fail_text(self, reason: str) -> None:
        """There is no tokenizer, and so nothing can be served."""
        ...

    async def leave(self) -> None:
        """Be released, and end what is open."""
        ...


@dataclass(frozen=True, slots=True)
class FrontParts:
    """What every front is made of."""

    spec: ReplicaSpec
    clock: Clock
    view: Addressed
    reporter: Reporter
    departure: Departure
    generator: Generator
    server: HttpServer
    access_log: BackgroundLog
    digest: PrefixDigest | None
    """Hears of cached prefixes; None: nothing is cached here."""


class FrontLife:
    """One front's process. `run` is its whole life."""

    def __init__(self, front: Living, parts: FrontParts) -> None:
        self._front = front
        self._parts = parts
        self._encoder: PromptEncoder | None = None
        is_simulated = parts.spec.engine.kind == "simulated"
        self._grammars = (
            None if is_simulated else GrammarChecker(f"headrace: grammars {parts.spec.replica_id}")
        )
        self._stop_requested = asyncio.Event()
        self._is_broken = False

    def __repr__(self) -> str:
        return f"FrontLife({self._parts.spec.replica_id}, {self._parts.view.address or 'not listening'})"

    def on_notice(self, left_s: float) -> None:
        """Its machine goes away in so many seconds: leave."""
        parts = self._parts
        parts.departure.leave_by_s = parts.clock.now_s() + left_s
        self._stop_requested.set()

    async def run(self) -> int:
        """Serve until SIGTERM or SIGINT and drained; return the exit status, 1 after a fault of its own."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop_requested.set)
        spec, clock, view = self._parts.spec, self._parts.clock, self._parts.view
        try:
            await self._listen()
            await self._front.listen()
        except (OSError, ConfigError) as error:
            print(f"front: {error}", file=sys.stderr)
            self._parts.access_log.close()
            return 2
        _log.info("%s listens on %s", spec.replica_id, view.address)
        self._front.start()
        watchers = [NoticeWatcher(source, clock, self.on_notice) for source in notice_sources(spec)]
        lasting = [asyncio.create_task(self._parts.reporter.run())]
        lasting += [asyncio.create_task(watcher.run()) for watcher in watchers]
        for task in lasting:
            task.add_done_callback(self._on_end_of)
        loading = asyncio.create_task(self._load_text())  # in a thread, which cannot be cancelled
        try:
            await self._stop_requested.wait()
            await self._front.leave()
        finally:
            for task in lasting:
                task.cancel()
            await asyncio.wait([*lasting, loading], timeout=LAST_MOMENTS_S)
            if view.socket_path:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(view.socket_path)
            self._parts.access_log.close()
        return 1 if self._is_broken else 0

    def _on_end_of(self, task: asyncio.Task[None]) -> None:
        """What lasts as long as the front has broken: nobody would hear of it any more. Leave, as failed."""
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("the front broke and leaves", exc_info=error)
            self._is_broken = True
            self._stop_requested.set()

    async def end(self, limit_s: float) -> None:
        """Close what a front has when nothing is open any more, and tell the last of it within limit_s."""
        await self._parts.server.close()
        await self._parts.departure.wait_for_last(self._parts.reporter.has_told_all, limit_s)
        if self._encoder is not None:
            self._encoder.close()
        if self._grammars is not None:
            await self._grammars.close()

    async def _listen(self) -> None:
        """Serve on TCP, and gateways of this machine on a UNIX socket; without that one they use TCP. Raises
        OSError and ConfigError."""
        spec, server, view = self._parts.spec, self._parts.server, self._parts.view
        try:
            view.address = await server.listen(spec.host, spec.port, spec.identity)
        except OSError as error:
            raise OSError(f"cannot listen on {spec.host}:{spec.port}: {error.strerror or error}") from error
        path = front_socket_path(spec.run_dir, spec.replica_id)
        if not path:
            return
        try:
            await server.listen_unix(path)
        except OSError as error:
            _log.warning("cannot listen on %s: %s; gateways use %s", path, error, view.address)
        else:
            view.socket_path = path

    async def _load_text(self) -> None:
        spec, generator = self._parts.spec, self._parts.generator
        try:
            model: TextModel = await asyncio.to_thread(load_text_model, spec.engine)
        except ModelError as error:
            self._front.fail_text(str(error))
        except Exception as error:
            _log.exception("the model's tokenizer could not be loaded")
            reason = f"the model's tokenizer could not be loaded: {type(error).__name__}: {error}"
            self._front.fail_text(reason)
        else:
            self._encoder = PromptEncoder(model.tokenizer)
            shared = await shared_prefix_tokens(spec.shared_prefix, model, self._encoder)
            caching = PromptCaching(spec.endpoint, self._parts.digest, shared)
            generator.set_model(model, self._encoder, caching, self._grammars)
        self._parts.reporter.notify()
