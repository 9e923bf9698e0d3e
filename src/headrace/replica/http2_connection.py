"""One HTTP/2 client connection: frames in, streams, and one write per turn of the event loop for all of them.

Owns the socket, the windows towards the client and the connection's end. A stream that cannot send delays no
other. Must not know routes or models. Source: RFC 9113.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import cast

from headrace.replica import http2_frames as h2
from headrace.replica.http2_frames import ErrorCode, Http2Error, Setting, StreamError
from headrace.replica.http2_heads import AnswerBlocks
from headrace.replica.http2_intake import CONNECTION_WINDOW_BYTES, RequestIntake
from headrace.replica.http2_stream import RECEIVE_WINDOW_BYTES, Http2Stream
from headrace.replica.http_connection import ConnectionOwner
from headrace.replica.http_messages import HttpRequest
from headrace.replica.write_stall import WriteStall

_HIGH_WATER_BYTES = 512 * 1024
"""Unsent bytes of all streams together at which further ones wait in their streams."""
_MAX_HELD_BYTES = 1024 * 1024
"""Frames other than DATA that may wait for a client that does not read."""
_WINDOW_UPDATE_WORD = 4 << 8 | h2.WINDOW_UPDATE
_PRIORITY_BYTES = 5
_MAX_FRAMES_AT_ONCE = 64
CallSoon = Callable[[Callable[[], None]], object]
"""Calls a function in the next turn of the event loop."""


class Http2Connection(asyncio.Protocol):
    """Streams of one client. Born when its preface was received."""

    def __init__(
        self, owner: ConnectionOwner, blocks: AnswerBlocks, call_soon: CallSoon, is_trusted: bool = False
    ) -> None:
        self._owner = owner
        self._call_soon = call_soon
        self._limits = owner.limits
        self.blocks = blocks
        self.max_queued_bytes = owner.limits.max_write_buffer_bytes
        self._transport: asyncio.Transport | None = None
        self._intake = RequestIntake(self, owner, is_trusted)
        self.streams: dict[int, Http2Stream] = {}
        self._queued: dict[Http2Stream, None] = {}
        """Streams with bytes that wait, in the order of their turns."""
        self._rest = b""
        self._has_settings = False
        self._num_control_frames = 0
        self._initial_window = h2.DEFAULT_WINDOW_BYTES
        self.window = h2.DEFAULT_WINDOW_BYTES
        """Bytes that the client takes on all streams together."""
        self.is_holding = False
        """The client does not read: DATA waits."""
        self._num_held_bytes = 0
        self._out: list[bytes] = []
        self.is_leaving = False
        """GOAWAY was sent: new streams are refused, and the connection closes with the last one."""
        self._idle_since_s = owner.clock.now_s()
        self._closing_since_s: float | None = None
        self._stall = WriteStall()

    def __repr__(self) -> str:
        return f"Http2Connection({len(self.streams)} streams, {len(self._queued)} waiting to send)"

    # ---- the transport's events

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._transport.set_write_buffer_limits(_HIGH_WATER_BYTES)
        settings = {
            Setting.MAX_CONCURRENT_STREAMS: self._limits.max_streams,
            Setting.INITIAL_WINDOW_SIZE: RECEIVE_WINDOW_BYTES,
            Setting.MAX_HEADER_LIST_SIZE: self._limits.max_head_bytes,
        }
        self.push(h2.pack_settings(settings))
        self.push(h2.pack_window_update(0, CONNECTION_WINDOW_BYTES - h2.DEFAULT_WINDOW_BYTES))
        if not self._owner.joined(self):
            self._fail(Http2Error(ErrorCode.ENHANCE_YOUR_CALM, "too many connections; try again later"))

    def data_received(self, data: bytes) -> None:
        if self._closing_since_s is not None:
            return
        if self._rest:
            data = self._rest + data
        unpack, read_number, streams = h2.FRAME_HEADER.unpack_from, h2.UINT32.unpack_from, self.streams
        is_plain = self._has_settings and not self._intake.block_stream_id
        at, end = 0, len(data)
        try:
            while end - at >= h2.HEADER_BYTES:
                word, flags, stream_id = unpack(data, at)
                length = word >> 8
                if length > h2.DEFAULT_FRAME_BYTES:
                    raise Http2Error(ErrorCode.FRAME_SIZE_ERROR, f"a frame announces {length} bytes")
                start = at + h2.HEADER_BYTES
                if end - start < length:
                    break
                at = start + length
                if word == _WINDOW_UPDATE_WORD and is_plain:
                    # One per frame that we sent: worth a short cut.
                    stream = streams.get(stream_id)
                    if stream is not None and not stream.queue:
                        stream.window += (number := read_number(data, start)[0])
                        if number > 0 and stream.window <= h2.MAX_WINDOW_BYTES:
                            continue
                        stream.window -= number
                self._on_frame(word, flags, stream_id & h2.STREAM_ID_MASK, data[start:at])
                if self._closing_since_s is not None:
                    return
                is_plain = self._has_settings and not self._intake.block_stream_id
        except Http2Error as error:
            self._fail(error)
            return
        self._rest = data[at:]

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        self._closing_since_s = self._owner.clock.now_s()
        self._owner.left(self)
        self._drop_streams()

    def pause_writing(self) -> None:
        assert self._transport is not None
        self.is_holding = True
        self._num_held_bytes = 0
        self._stall.begin(self._transport.get_write_buffer_size(), self._owner.clock.now_s())

    def resume_writing(self) -> None:
        self.is_holding = False
        self._send_queued()

    # ---- frames in

    def _on_frame(self, word: int, flags: int, stream_id: int, payload: bytes) -> None:
        intake = self._intake
        kind = word & 0xFF
        if intake.block_stream_id and (kind != h2.CONTINUATION or stream_id != intake.block_stream_id):
            raise Http2Error(ErrorCode.PROTOCOL_ERROR, "a header block is interrupted by another frame")
        if not self._has_settings and kind != h2.SETTINGS:
            raise Http2Error(ErrorCode.PROTOCOL_ERROR, "the first frame is not SETTINGS")
        if word == _WINDOW_UPDATE_WORD:
            self._on_window_update(stream_id, payload)
        elif kind == h2.DATA:
            intake.on_data(flags, stream_id, payload)
        elif kind == h2.HEADERS:
            intake.on_headers(flags, stream_id, payload)
        elif kind == h2.CONTINUATION:
            intake.on_continuation(flags, payload)
        else:
            self.count_control_frame()
            self._on_control_frame(kind, flags, stream_id, payload)

    def _on_control_frame(self, kind: int, flags: int, stream_id: int, payload: bytes) -> None:
        if kind == h2.SETTINGS:
            self._on_settings(flags, stream_id, payload)
        elif kind == h2.PING:
            self._on_ping(flags, stream_id, payload)
        elif kind == h2.RST_STREAM:
            self._on_reset(stream_id, payload)
        elif kind == h2.WINDOW_UPDATE:
            raise Http2Error(ErrorCode.FRAME_SIZE_ERROR, f"WINDOW_UPDATE has {len(payload)} bytes")
        elif kind == h2.PUSH_PROMISE:
            raise Http2Error(ErrorCode.PROTOCOL_ERROR, "a client may not push")
        elif kind == h2.PRIORITY and (not stream_id or len(payload) != _PRIORITY_BYTES):
            raise Http2Error(ErrorCode.PROTOCOL_ERROR, "PRIORITY of no stream, or of a wrong size")
        elif kind == h2.GOAWAY and stream_id:
            raise Http2Error(ErrorCode.PROTOCOL_ERROR, "GOAWAY belongs to no stream")
        # Others are ignored (RFC 9113, 4.1), and GOAWAY: the client closes when it has its answers.

    def count_control_frame(self) -> None:
        """Count a frame that carries nothing of a request. Raises Http2Error if there are too many."""
        self._num_control_frames += 1
        if self._num_control_frames > self._limits.max_control_frames:
            raise Http2Error(ErrorCode.ENHANCE_YOUR_CALM, "too many frames that belong to no request")

    def _on_settings(self, flags: int, stream_id: int, payload: bytes) -> None:
        if stream_id:
            raise Http2Error(ErrorCode.PROTOCOL_ERROR, "SETTINGS belong to no stream")
        if flags & h2.ACK:
            if payload or not self._has_settings:
                raise Http2Error(ErrorCode.FRAME_SIZE_ERROR, "an acknowledgement out of place")
            return
        self._has_settings = True
        for number, value in h2.read_settings(payload):
            if number == Setting.INITIAL_WINDOW_SIZE:
                self._change_initial_window(value)
            elif number == Setting.ENABLE_PUSH and value > 1:
                raise Http2Error(ErrorCode.PROTOCOL_ERROR, f"ENABLE_PUSH is {value}")
            elif number == Setting.MAX_FRAME_SIZE and not h2.DEFAULT_FRAME_BYTES <= value < 1 << 24:
                raise Http2Error(ErrorCode.PROTOCOL_ERROR, f"MAX_FRAME_SIZE is {value}")
        self.push(h2.pack_frame(h2.SETTINGS, h2.ACK, 0))

    def _change_initial_window(self, num_bytes: int) -> None:
        if num_bytes > h2.MAX_WINDOW_BYTES:
            raise Http2Error(ErrorCode.FLOW_CONTROL_ERROR, f"INITIAL_WINDOW_SIZE is {num_bytes}")
        change = num_bytes - self._initial_window
        self._initial_window = num_bytes
        for stream in self.streams.values():
            try:
                stream.grant(change)
            except StreamError as error:
                raise Http2Error(error.code, str(error)) from None
        self._send_queued()

    def _on_ping(self, flags: int, stream_id: int, payload: bytes) -> None:
        if stream_id or len(payload) != 8:
            code = ErrorCode.PROTOCOL_ERROR if stream_id else ErrorCode.FRAME_SIZE_ERROR
            raise Http2Error(code, "PING of a stream, or of a wrong size")
        if not flags & h2.ACK:
            self.push(h2.pack_frame(h2.PING, h2.ACK, 0, payload))

    def _on_window_update(self, stream_id: int, payload: bytes) -> None:
        num_bytes = int.from_bytes(payload, "big") & h2.MAX_WINDOW_BYTES
        if stream_id == 0:
            self.window += num_bytes
            if not num_bytes or self.window > h2.MAX_WINDOW_BYTES:
                raise Http2Error(ErrorCode.FLOW_CONTROL_ERROR, f"the window grows by {num_bytes} bytes")
            if self._queued and self.window - num_bytes < h2.DEFAULT_FRAME_BYTES:
                self._send_queued()  # it may have been this window that they waited for
            return
        stream = self.streams.get(stream_id)
        if stream is None:
            self._intake.check_not_idle(stream_id)
            return
        try:
            stream.grant(num_bytes)
        except StreamError as error:
            self.reset(stream, error.code)
            return
        if stream in self._queued:
            self._send_some(stream)

    def _on_reset(self, stream_id: int, payload: bytes) -> None:
        h2.read_uint32(payload, "RST_STREAM")
        stream = self.streams.get(stream_id)
        if stream is None:
            self._intake.check_not_idle(stream_id)
        else:
            self._forget(stream)
            stream.gone()

    # ---- streams

    def open(self, stream_id: int) -> Http2Stream:
        now_s = self._owner.clock.now_s()
        stream = self.streams[stream_id] = Http2Stream(self, stream_id, self._initial_window, now_s)
        return stream

    def hand_over(self, stream: Http2Stream, request: HttpRequest) -> None:
        self._owner.handle(request, stream)

    def reset(self, stream: Http2Stream, code: ErrorCode) -> None:
        """End a stream early; its request is aborted unless it was answered."""
        if stream.stream_id in self.streams:
            self._intake.remember_reset(stream.stream_id)
            self.push(h2.pack_reset(stream.stream_id, code))
            self._forget(stream)
        stream.gone()

    def sent(self, stream: Http2Stream) -> None:
        """The stream's whole answer was written."""
        if not stream.is_received:  # it was answered early: the rest of the request is not wanted
            self._intake.remember_reset(stream.stream_id)
            self.push(h2.pack_reset(stream.stream_id, ErrorCode.NO_ERROR))
        self._forget(stream)

    def _forget(self, stream: Http2Stream) -> None:
        self.streams.pop(stream.stream_id, None)
        self._queued.pop(stream, None)
        self._intake.release(stream)
        stream.drop()
        if not self.streams:
            self._idle_since_s = self._owner.clock.now_s()
            if self.is_leaving:
                self._close()

    def _drop_streams(self) -> None:
        for stream in list(self.streams.values()):
            self._forget(stream)
            stream.gone()

    # ---- frames out

    def push(self, frame: bytes) -> None:
        """Send a frame, with all others of this turn of the event loop in one write."""
        if not self._out:
            self._call_soon(self._flush)
        self._out.append(frame)

    def push_headers(self, stream_id: int, block: bytes, *, is_end: bool) -> None:
        self.push(h2.pack_headers(stream_id, block, is_end=is_end, max_frame_bytes=h2.DEFAULT_FRAME_BYTES))

    def queue(self, stream: Http2Stream) -> None:
        """Send the rest of a stream when windows and socket allow."""
        if stream not in self._queued:
            self._queued[stream] = None
            stream.progress_s = self._owner.clock.now_s()

    def _send_queued(self) -> None:
        """Let streams that wait take turns, one frame each, until none can send any more."""
        waiting = list(self._queued)
        num_frames = 0
        while waiting and num_frames < _MAX_FRAMES_AT_ONCE:  # the rest goes on after the flush
            waiting = [stream for stream in waiting if self._send_some(stream)]
            num_frames += len(waiting)

    def _send_some(self, stream: Http2Stream) -> bool:
        """Send one frame of a stream that waits. True: it may have more to send."""
        if not stream.send_some():
            return False
        stream.progress_s = self._owner.clock.now_s()
        if stream.queue:
            return True
        del self._queued[stream]
        if stream.is_done:
            self.sent(stream)
        return False

    def _flush(self) -> None:
        self._intake.num_taken = 0
        self._write()
        if self._queued:
            self._send_queued()

    def _write(self) -> None:
        out, transport = self._out, self._transport
        data = b"".join(out)
        out.clear()
        if transport is None or not data:
            return
        was_holding = self.is_holding  # what fills the socket just now, a step of many streams, is not held
        transport.write(data)
        self._num_held_bytes += len(data) if was_holding else 0
        if self._num_held_bytes > _MAX_HELD_BYTES:
            transport.abort()  # it asks and asks, and reads no answer

    # ---- the end

    def _fail(self, error: Http2Error) -> None:
        """End the connection: the client broke the protocol."""
        self._closing_since_s = self._owner.clock.now_s()
        self.push(h2.pack_goaway(self._intake.last_stream_id, error.code, str(error)))
        self._drop_streams()
        self._close()

    def _close(self) -> None:
        """Write what is due, and read on until the client closes or `linger_s` is over: closing with bytes
        unread would make the kernel drop what was written."""
        self._write()
        self._closing_since_s = self._closing_since_s or self._owner.clock.now_s()
        transport = self._transport
        if transport is not None and transport.can_write_eof() and not transport.is_closing():
            transport.write_eof()

    def close_if_idle(self) -> None:
        """Take no new streams; close when the open ones have ended."""
        if self._transport is None or self.is_leaving or self._closing_since_s is not None:
            return
        self.is_leaving = True
        self.push(h2.pack_goaway(self._intake.last_stream_id, ErrorCode.NO_ERROR, "this replica is leaving"))
        if not self.streams:
            self._close()

    def abort(self) -> None:
        """Drop the connection and what is unsent."""
        if self._transport is not None:
            self._transport.abort()

    def check_time_limits(self, now_s: float) -> None:
        """Apply the time limits. Called every `sweep_s`."""
        transport, limits = self._transport, self._limits
        self._num_control_frames = 0
        if transport is None:
            return
        if self._closing_since_s is not None:
            if now_s - self._closing_since_s > limits.linger_s:
                transport.abort()
            return
        num_unread = transport.get_write_buffer_size()
        if self.is_holding and self._stall.is_over(num_unread, now_s, limits.write_stall_s):
            transport.abort()
        for stream in list(self._queued):
            if now_s - stream.progress_s > limits.write_stall_s:
                self.reset(stream, ErrorCode.CANCEL)
        try:
            self._intake.check_time_limits(now_s)
        except Http2Error as error:
            self._fail(error)
        if not self.streams and now_s - self._idle_since_s > limits.keep_alive_s:
            self.close_if_idle()
