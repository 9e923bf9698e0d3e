"""Siblings' engines, as a front uses them: one connection per sibling, with all streams that it hosts.

Owns the connections and which stream is on which. A sibling that dies, hangs or sends nonsense loses the
streams that it hosts, each of which is told. Must not know why a stream is hosted, or what becomes of it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Protocol, cast

from headrace.api.framing import FrameDecoder, encode_frame
from headrace.api.messages import (
    Abort,
    EngineFailed,
    GenerationRequest,
    PeerCommand,
    PeerEvent,
    StepBatch,
    StepOutput,
    Submit,
)
from headrace.clock import Clock
from headrace.errors import ProtocolError, text_of

CONNECT_LIMIT_S = 1.0
SILENCE_LIMIT_S = 5.0
"""A host says something every second; one that does not is hung."""
IDLE_LIMIT_S = 10.0
"""A connection without streams is closed after it."""
_CHECK_S = 0.5
_log = logging.getLogger(__name__)


class HostedStream(Protocol):
    """One stream in a sibling's engine, as its owner sees it."""

    def on_output(self, output: StepOutput, now_s: float) -> bool:
        """Take what one step gave; say whether it wants to be flushed."""
        ...

    def flush(self) -> None: ...

    def on_engine_lost(self, reason: str) -> None:
        """The host or its engine is gone, and this stream with it."""
        ...

    def on_given_back(self, reason: str) -> None:
        """The host does not take it, or no longer carries it; nothing is wrong with either."""
        ...

    def on_broken(self) -> None:
        """`on_output` raised: a bug of ours."""
        ...


class PeerPool:
    """All connections to siblings, by the path of their sockets: bounded by how many siblings there are."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._links: dict[str, PeerLink] = {}
        self._check: asyncio.TimerHandle | None = None

    def __repr__(self) -> str:
        return f"PeerPool({self.num_streams} streams on {len(self._links)} siblings)"

    @property
    def num_streams(self) -> int:
        return sum([len(link.streams) for link in self._links.values()])

    def submit(self, path: str, request: GenerationRequest, stream: HostedStream) -> None:
        """Ask the sibling at `path` to continue a stream. What comes of it is told to `stream`, later."""
        link = self._links.get(path)
        if link is None:
            link = self._links[path] = PeerLink(path, self._clock, self._forget)
            link.start()
        if self._check is None:
            self._check = asyncio.get_running_loop().call_later(_CHECK_S, self._run_check)
        link.submit(request, stream)

    def abort(self, path: str, request_id: str) -> None:
        """Take a stream back; it hears nothing more. Unknown ids are ignored."""
        if (link := self._links.get(path)) is not None:
            link.abort(request_id)

    def has(self, path: str, request_id: str) -> bool:
        link = self._links.get(path)
        return link is not None and request_id in link.streams

    def close(self) -> None:
        """Close all connections: hosts abort what they have of this front."""
        if self._check is not None:
            self._check.cancel()
            self._check = None
        for link in list(self._links.values()):
            link.lose("this front is leaving")

    def _forget(self, link: PeerLink) -> None:
        if self._links.get(link.path) is link:
            del self._links[link.path]

    def _run_check(self) -> None:
        now_s = self._clock.now_s()
        for link in list(self._links.values()):
            link.check(now_s)
        self._check = None
        if self._links:
            self._check = asyncio.get_running_loop().call_later(_CHECK_S, self._run_check)


class PeerLink(asyncio.Protocol):
    """One sibling's engine over one connection; never connected twice."""

    def __init__(self, path: str, clock: Clock, on_end: Callable[[PeerLink], None]) -> None:
        self.path = path
        self.streams: dict[str, HostedStream] = {}
        self._clock = clock
        self._on_end = on_end
        self._decoder: FrameDecoder[PeerEvent] = FrameDecoder(PeerEvent)
        self._transport: asyncio.Transport | None = None
        self._unsent: list[PeerCommand] = []
        """Until it is connected: at most two per stream."""
        self._is_lost = False
        self._heard_at_s = self._used_at_s = clock.now_s()
        self._connecting: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        return f"PeerLink({self.path}, {len(self.streams)} streams)"

    def start(self) -> None:
        self._connecting = asyncio.get_running_loop().create_task(self._connect())

    async def _connect(self) -> None:
        try:
            async with asyncio.timeout(CONNECT_LIMIT_S):
                await asyncio.get_running_loop().create_unix_connection(lambda: self, self.path)
        except (OSError, TimeoutError) as error:
            for stream in self._end(f"it cannot be reached: {text_of(error)}"):
                stream.on_given_back("it cannot be reached")

    def submit(self, request: GenerationRequest, stream: HostedStream) -> None:
        assert request.request_id not in self.streams, f"{request.request_id} is hosted already"
        self.streams[request.request_id] = stream
        self._send(Submit(request))

    def abort(self, request_id: str) -> None:
        if self.streams.pop(request_id, None) is not None:
            self._send(Abort(request_id))

    def _send(self, command: PeerCommand) -> None:
        self._used_at_s = self._clock.now_s()
        if self._transport is None:
            self._unsent.append(command)
        else:
            self._transport.write(encode_frame(command))

    def check(self, now_s: float) -> None:
        """End a connection whose other side hangs, or that nobody needs."""
        if now_s - self._heard_at_s > SILENCE_LIMIT_S:
            self.lose(f"it said nothing for {SILENCE_LIMIT_S:g} s")
        elif not self.streams and now_s - self._used_at_s > IDLE_LIMIT_S:
            self.lose("nothing is hosted there")

    # ---- what the host does

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._heard_at_s = self._clock.now_s()
        if self._is_lost:
            transport.abort()  # type: ignore[attr-defined]  # a stream transport has it
            return
        for command in self._unsent:
            self._transport.write(encode_frame(command))
        self._unsent.clear()

    def data_received(self, data: bytes) -> None:
        self._heard_at_s = self._clock.now_s()
        try:
            for event in self._decoder.feed(data):
                if isinstance(event, StepBatch):
                    self._hand_out(event, self._heard_at_s)
                elif isinstance(event, EngineFailed):
                    self.lose(event.error)
        except ProtocolError as error:
            self.lose(f"it sent what is not of the contract: {error}")

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        self.lose("the connection to it ended")

    def _hand_out(self, batch: StepBatch, now_s: float) -> None:
        touched: list[HostedStream] = []
        for output in batch.outputs:
            stream = self.streams.get(output.request_id)
            if stream is None:
                continue  # aborted while this was on its way
            if output.finish_reason is not None:
                del self.streams[output.request_id]
            if output.finish_reason == "aborted":
                stream.on_given_back(output.error)
                continue
            try:
                if stream.on_output(output, now_s):
                    touched.append(stream)
            except Exception:
                _log.exception("request %s: handling a host's output failed", output.request_id)
                self.abort(output.request_id)
                stream.on_broken()
        for stream in touched:
            stream.flush()

    # ---- the end

    def lose(self, reason: str) -> None:
        """End the connection; every stream on it is told."""
        for stream in self._end(reason):
            stream.on_engine_lost(reason)

    def _end(self, reason: str) -> list[HostedStream]:
        if self._is_lost:
            return []
        self._is_lost = True
        streams, self.streams = list(self.streams.values()), {}
        if streams:
            _log.warning("sibling at %s is lost with %d streams: %s", self.path, len(streams), reason)
        if self._transport is not None:
            self._transport.abort()
        elif self._connecting is not None:
            self._connecting.cancel()
        self._unsent.clear()
        self._on_end(self)
        return streams
