"""One request of the relay: its body is read whole, it is sent again to HAProxy, its answer is passed back.

Three kinds come here. One whose model HAProxy could not see: the model is found, and the answer goes back
byte by byte. A stream that is held for long (`x-headrace-wait`, with its model beside): its client is told
that it waits, until the real answer comes (`waiting_answer`). And one that found no router and no replica.
Each is sent again while HAProxy says that there is no router, or that every front refused (`relay_passes`).
Owns HAProxy's side of that request, its limits, and what is told when one side ends. Must not know endpoints
or replicas. Source: RFC 9112.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from typing import Literal, Protocol, cast
from urllib.parse import quote, unquote

import httptools
import msgspec

from headrace.api.messages import RelaySpec
from headrace.api.openai import RequestDecoder, describe_error
from headrace.clock import Clock
from headrace.errors import InvalidRequest, Overloaded, PayloadTooLarge, ReplicaLost, RequestError
from headrace.replica.http_messages import AnswerHeads, RequestTimeout
from headrace.replica.http_responder import retry_header
from headrace.replica.relay_passes import MAX_HEAD_BYTES, Passes, Word, read_word
from headrace.replica.relay_upstream import Upstream
from headrace.replica.waiting_answer import WaitingAnswer

HEAD_TIMEOUT_S = 10.0
CONNECT_TIMEOUT_S = 2.0
LINGER_S = 2.0
"""After a refusal that leaves bytes unread: how long they are read and dropped, so that HAProxy sees the
answer rather than a reset."""
MAX_MODEL_CHARACTERS = 200
"""No endpoint's name is longer than 128; a longer model is cut, and cannot become a known one by that."""
_NOT_PASSED_ON = frozenset(
    (
        *("connection", "keep-alive", "proxy-connection", "te", "trailer", "transfer-encoding", "upgrade"),
        *("content-length", "expect", "x-headrace-model", "x-headrace-wait", "x-headrace-pass"),
    )
)


class NamedModel(msgspec.Struct, frozen=True):
    """The one field of a request body that decides where it goes. msgspec skips all others."""

    model: str


_MODEL_DECODER = RequestDecoder(NamedModel)


def find_model(body: bytes | bytearray) -> str:
    """Return the string field `model` of a JSON object, wherever it stands; of several the last.

    Takes 1 to 3 ms per MB. Raises InvalidRequest.
    """
    try:
        return _MODEL_DECODER.decode(cast(bytes, body)).model
    except InvalidRequest as error:
        if error.code in ("missing_parameter", "invalid_type"):
            raise InvalidRequest(
                f"{error.message}. Several models are served: name one in the string field `model`.",
                param="model",
                code="model_required",
            ) from None
        raise


def head_again(method: str, target: str, headers: Sequence[tuple[str, str]], model: str, size: int) -> bytes:
    """Return the request's head for later passes: the same, with its model and one plain length, and open for
    the pass's name."""
    lines = [f"{method} {target} HTTP/1.1"]
    lines += [f"{name}: {value}" for name, value in headers if name not in _NOT_PASSED_ON]
    lines += [f"x-headrace-model: {quote(model[:MAX_MODEL_CHARACTERS], safe='')}"]
    lines += [f"content-length: {size}", "connection: close", "x-headrace-pass: "]
    return "\r\n".join(lines).encode("latin-1")


class RelayOwner(Protocol):
    """The relay, as its connections see it."""

    spec: RelaySpec
    clock: Clock
    heads: AnswerHeads

    def joined(self, connection: RelayConnection) -> bool:
        """Take the connection; false: there is no room for it."""
        ...

    def left(self, connection: RelayConnection) -> None: ...

    def reserve(self, num_bytes: int) -> bool:
        """Count body bytes as held (negative: no longer); false: there is no room for them."""
        ...


class RelayConnection(asyncio.Protocol):
    """One connection from HAProxy, for one request."""

    def __init__(self, owner: RelayOwner) -> None:
        self._owner = owner
        self._parser = httptools.HttpRequestParser(self)
        self._transport: asyncio.Transport | None = None
        self._phase: Literal["receiving", "forwarding", "ending"] = "receiving"
        self._upstream: Upstream | None = None
        self._connecting: asyncio.Task[None] | None = None
        self._is_complete = False
        self._has_answer = False
        self._num_reserved = 0
        self._began_s = self._last_data_s = owner.clock.now_s()
        self._target = b""
        self._headers: list[tuple[str, str]] = []
        self._head_bytes = 0
        self._is_in_head = True
        self._body = bytearray()
        self._head_again = b""
        self._first_bytes = bytearray()
        """Of a pass's answer, while they do not tell whether it is one."""
        self._passes = Passes()
        self._sending: asyncio.TimerHandle | None = None
        self._waiting: WaitingAnswer | None = None

    def __repr__(self) -> str:
        return f"<RelayConnection {self._phase} body={len(self._body)}>"

    # ---- the request; called by httptools

    def on_url(self, url: bytes) -> None:
        self._target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._is_in_head:  # later ones are trailers, and say nothing that anyone would believe
            self._headers.append((name.decode("latin-1").lower(), value.decode("latin-1")))

    def on_headers_complete(self) -> None:
        self._is_in_head = False
        lengths = [value for name, value in self._headers if name == "content-length"]
        if lengths and int(lengths[0]) > self._owner.spec.max_body_bytes:
            self._refuse_body(lengths[0])

    def on_body(self, data: bytes) -> None:
        if self._phase != "receiving" or self._is_complete:
            return
        if len(self._body) + len(data) > self._owner.spec.max_body_bytes:
            self._refuse_body("more")
        elif not self._owner.reserve(len(data)):
            self._end_with(Overloaded("too many large requests at once; try again later", retry_after_s=1.0))
        else:
            self._num_reserved += len(data)
            self._body += data

    def on_message_complete(self) -> None:
        self._is_complete = self._phase == "receiving"

    def _refuse_body(self, got: str) -> None:
        limit = self._owner.spec.max_body_bytes
        self._end_with(
            PayloadTooLarge(f"the body has {got} bytes; at most {limit} are allowed (gateway.max_body_mb)")
        )

    # ---- HAProxy's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        if not self._owner.joined(self):
            self._end_with(Overloaded("too many large requests at once; try again later", retry_after_s=1.0))

    def data_received(self, data: bytes) -> None:
        if self._phase != "receiving":
            return
        self._last_data_s = self._owner.clock.now_s()
        if self._is_in_head:
            self._head_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            if self._phase == "receiving":
                self._end_with(InvalidRequest(f"not valid HTTP: {error}", code="bad_http"))
        if self._is_complete:
            self._forward()
        elif self._is_in_head and self._head_bytes > MAX_HEAD_BYTES:
            self._end_with(PayloadTooLarge(f"the request's head is longer than {MAX_HEAD_BYTES} bytes"))

    def eof_received(self) -> None:
        """HAProxy closed: the client left. The transport closes, too."""

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        self._phase = "ending"
        self._free_body()
        self._drop_upstream()
        self._owner.left(self)

    def pause_writing(self) -> None:
        if self._upstream is not None:
            self._upstream.pause_reading()

    def resume_writing(self) -> None:
        if self._upstream is not None:
            self._upstream.resume_reading()

    # ---- later passes

    def _forward(self) -> None:
        if self._target == b"/health":
            self._end_with_bytes(200, b'{"status":"ok"}')
            return
        headers = dict(self._headers)
        try:
            if "x-headrace-wait" in headers:
                model = unquote(headers.get("x-headrace-model", ""))
                if headers["x-headrace-wait"] != "router":
                    self._begin_waiting(headers["x-headrace-wait"])
            else:
                model = find_model(self._body)
        except RequestError as error:
            self._end_with(error)
            return
        self._phase = "forwarding"
        method = self._parser.get_method().decode("latin-1")
        target = self._target.decode("latin-1")
        self._head_again = head_again(method, target, self._headers, model, len(self._body))
        self._began_s = self._owner.clock.now_s()
        self._send()

    def _send(self) -> None:
        """Begin a later pass. The body stays here until it is known to be the last one."""
        self._sending = None
        head = self._head_again + self._passes.begin().encode() + b"\r\n\r\n"
        self._upstream = Upstream(self, head, self._body)
        self._connecting = asyncio.get_running_loop().create_task(self._connect(self._upstream))

    def _begin_waiting(self, eta: str) -> None:
        """Begin the client's stream. `eta`: the router's word, in seconds."""
        try:
            eta_s = float(eta)
        except ValueError:
            eta_s = -1.0
        assert self._transport is not None
        self._waiting = WaitingAnswer(self._transport.write, eta_s, self._owner.clock.now_s())
        self._waiting.begin(self._owner.heads.stream("", keep_alive=False, is_chunked=True))

    async def _connect(self, upstream: Upstream) -> None:
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                await upstream.connect(self._owner.spec.upstream_socket)
        except (OSError, TimeoutError):
            if self._phase == "forwarding":  # its listener is closed: HAProxy drains, or is being restarted
                self._upstream = None
                self._end_with(Overloaded("the gateway is restarting or stopping", retry_after_s=1.0))

    def pass_on(self, data: bytes) -> None:
        """Send a piece of the answer. Called by the second pass."""
        self._last_data_s = self._owner.clock.now_s()
        if self._transport is None:
            return
        if not self._has_answer:
            self._first_bytes += data
            word = read_word(self._first_bytes)
            if word in ("away", "refused"):
                self._send_later(word)
            if word != "answer":
                return
            data = self._accept()
        self._deliver(data)

    def _deliver(self, data: bytes) -> None:
        assert self._transport is not None
        if self._waiting is None:
            self._transport.write(data)
        else:
            self._waiting.feed(data)
            self._end_waiting()

    def _accept(self) -> bytes:
        """This pass is the last one. Return the first bytes of its answer."""
        first, self._first_bytes, self._has_answer = bytes(self._first_bytes), bytearray(), True
        self._body = bytearray()
        self._free_body()
        return first

    def _send_later(self, word: Word) -> None:
        """It was no answer: the router is being restarted, or fronts refused that leave or have no room."""
        self._first_bytes.clear()
        self._drop_upstream()
        pause_s = self._passes.pause_s(word, self._owner.clock.now_s())
        if pause_s is None:
            who = "the gateway's router is away" if word == "away" else "no replica takes this request"
            self._end_with(Overloaded(f"{who}; try again later", retry_after_s=1.0))
        else:
            self._sending = asyncio.get_running_loop().call_later(pause_s, self._send)

    def body_sent(self) -> None:
        """The body is gone, or not wanted any more. Called by the second pass."""
        self._last_data_s = self._owner.clock.now_s()

    def answer_ended(self) -> None:
        """HAProxy closed the second pass. An answer that was cut stays visibly cut: nothing is added."""
        self._upstream = None
        if self._phase != "forwarding" or self._transport is None:
            return
        if self._first_bytes:  # cut in its head
            self._deliver(self._accept())
        if self._waiting is not None:
            self._waiting.end()
            self._end_waiting()
        elif self._has_answer:
            self._phase = "ending"
            self._transport.close()
        else:
            self._end_with(ReplicaLost("the gateway closed this request without an answer; send it again"))

    # ---- ends

    def _end_waiting(self) -> None:
        """Close if the answer is whole; one that was cut must look so: its last chunk is missing."""
        assert self._waiting is not None
        assert self._transport is not None
        if self._waiting.state in ("ended", "broken"):
            self._phase = "ending"
            self._transport.close()

    def _end_with(self, error: RequestError) -> None:
        self._end_with_bytes(error.status, msgspec.json.encode(describe_error(error)), retry_header(error))

    def _end_with_bytes(self, status: int, body: bytes, headers: str = "") -> None:
        if self._waiting is not None:  # the status is out: an error event takes its place
            self._waiting.refuse(body)
            self._free_body()
            self._drop_upstream()
            self._end_waiting()
            return
        self._phase = "ending"
        self._last_data_s = self._owner.clock.now_s()
        self._body = bytearray()
        self._free_body()
        self._drop_upstream()
        if self._transport is None:
            return
        head = self._owner.heads.whole(status, len(body), "application/json", headers, keep_alive=False)
        self._transport.write(head + body)
        with contextlib.suppress(OSError):
            self._transport.write_eof()

    def _free_body(self) -> None:
        self._owner.reserve(-self._num_reserved)
        self._num_reserved = 0

    def _drop_upstream(self) -> None:
        if self._connecting is not None:
            self._connecting.cancel()
        if self._sending is not None:
            self._sending.cancel()
        upstream, self._upstream = self._upstream, None
        if upstream is not None:
            upstream.abort()

    def abort(self) -> None:
        """Drop both sides."""
        if self._transport is not None:
            self._transport.abort()

    def check_time_limits(self, now_s: float) -> None:
        """Apply the time limits. Called by the owner's sweep."""
        spec, silence_s = self._owner.spec, now_s - self._last_data_s
        if self._waiting is not None:
            self._waiting.tick(now_s)
        if self._phase == "ending":
            if (silence_s > LINGER_S and not self._has_answer) or silence_s > spec.answer_timeout_s:
                self.abort()
        elif self._phase == "forwarding":
            if silence_s > spec.answer_timeout_s:
                self.abort()
        elif self._is_in_head:
            if now_s - self._began_s > HEAD_TIMEOUT_S:
                self.abort()
        elif silence_s > spec.body_idle_timeout_s or now_s - self._began_s > spec.body_timeout_s:
            self._end_with(RequestTimeout("the request's body did not come in time; send it without pauses"))
