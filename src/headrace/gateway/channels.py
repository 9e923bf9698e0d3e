"""The router's small sockets: load reports in, completion lines in, demand out. Bytes to messages and back.

Owns framing, back-off and bounds of these connections. Must not decide anything: callbacks do.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import cast

from headrace.api.framing import FrameDecoder, encode_frame
from headrace.api.messages import Demand, GatewaySpec, LoadReport, Outlook, ReportAck
from headrace.errors import ProtocolError
from headrace.gateway.completions import Completion, CompletionDecoder

logger = logging.getLogger(__name__)

MAX_REPORT_BYTES = 4 * 1024 * 1024
MAX_UNSENT_BYTES = 256 * 1024
"""A peer that does not read is disconnected at this many."""
RECONNECT_MIN_S, RECONNECT_MAX_S = 0.05, 1.0
CONNECT_TIMEOUT_S = 1.0
MIN_GAP_S = 0.01
"""Between two demands, however many requests find no replica."""


class ReportConnection(asyncio.Protocol):
    """One front's connection: LoadReport in, ReportAck out."""

    def __init__(
        self,
        on_report: Callable[[ReportConnection, LoadReport], None],
        on_lost: Callable[[ReportConnection], None],
        on_error: Callable[[ProtocolError], None],
    ) -> None:
        self._on_report = on_report
        self._on_lost = on_lost
        self._on_error = on_error
        self._decoder: FrameDecoder[LoadReport] = FrameDecoder(LoadReport, MAX_REPORT_BYTES)
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's own class, of the same shape

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._on_lost(self)

    def data_received(self, data: bytes) -> None:
        try:
            for report in self._decoder.feed(data):
                self._on_report(self, report)
        except ProtocolError as error:
            self._on_error(error)
            if self._transport is not None:
                self._transport.abort()

    def acknowledge(self, ack: ReportAck) -> None:
        transport = self._transport
        if transport is None:
            return
        transport.write(encode_frame(ack))
        if transport.get_write_buffer_size() > MAX_UNSENT_BYTES:
            transport.abort()


class CompletionConnection(asyncio.Protocol):
    """One HAProxy process's completion log."""

    def __init__(self, on_completion: Callable[[Completion], None], decoder: CompletionDecoder) -> None:
        self._on_completion = on_completion
        self._decoder = decoder

    def data_received(self, data: bytes) -> None:
        for completion in self._decoder.feed(data):
            self._on_completion(completion)


class ControllerLink:
    """The connection to the controller: tries again for ever, and the router works without it."""

    def __init__(
        self,
        socket: str,
        period_s: float,
        demand: Callable[[], Demand],
        on_message: Callable[[GatewaySpec | Outlook], None],
    ) -> None:
        self._socket = socket
        self._period_s = period_s
        self._demand = demand
        self._on_message = on_message
        self._wake = asyncio.Event()
        self.is_connected = False

    def __repr__(self) -> str:
        return f"<ControllerLink {'connected' if self.is_connected else 'waiting'}>"

    def send_soon(self) -> None:
        """Send the demand now rather than at the end of the period."""
        self._wake.set()

    async def run(self) -> None:
        """Run for ever. Cancel it to stop."""
        delay_s = RECONNECT_MIN_S
        while True:
            try:
                async with asyncio.timeout(CONNECT_TIMEOUT_S):
                    reader, writer = await asyncio.open_unix_connection(self._socket)
            except (OSError, TimeoutError):
                await asyncio.sleep(delay_s)
                delay_s = min(delay_s * 2, RECONNECT_MAX_S)
                continue
            delay_s = RECONNECT_MIN_S
            self.is_connected = True
            try:
                await self._serve(reader, writer)
            except (OSError, ProtocolError) as error:
                logger.warning("controller: %s", error)
            finally:
                self.is_connected = False
                writer.transport.abort()
            await asyncio.sleep(RECONNECT_MIN_S)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        receiving = asyncio.create_task(self._receive(reader))
        try:
            while not (receiving.done() or writer.is_closing()):  # the former hears a moment later of the end
                self._wake.clear()
                writer.write(encode_frame(self._demand()))
                if writer.transport.get_write_buffer_size() > MAX_UNSENT_BYTES:
                    raise ProtocolError("the controller does not read what it is sent")
                await asyncio.sleep(MIN_GAP_S)
                try:
                    async with asyncio.timeout(self._period_s):
                        await self._wake.wait()
                except TimeoutError:
                    pass
            await receiving
        finally:
            receiving.cancel()

    async def _receive(self, reader: asyncio.StreamReader) -> None:
        decoder: FrameDecoder[GatewaySpec | Outlook] = FrameDecoder(GatewaySpec | Outlook)
        while data := await reader.read(65_536):
            for message in decoder.feed(data):
                self._on_message(message)
