"""What the events of one streamed answer mean for its record.

Owns the shape of OpenAI's streamed chunks, chat and text, as far as a measurement needs it.
Must not know sockets or HTTP framing.
"""

from __future__ import annotations

from typing import Any

import msgspec

from headrace.bench.events import EventParser, EventTooLong
from headrace.bench.record import ErrorKind, RequestRecord

MAX_ERROR_BYTES = 64 * 1024
MAX_DETAIL_CHARACTERS = 300


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: msgspec.Raw = msgspec.Raw()


class _Choice(msgspec.Struct):
    delta: _Delta | None = None
    text: str = ""


class _Details(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    prompt_tokens_details: _Details | None = None


class _Chunk(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


class AnswerRecorder:
    """Reads one answer's body, piece by piece, into a RequestRecord."""

    def __init__(self, record: RequestRecord) -> None:
        self.record = record
        self.status = 0
        """HTTP status; 0 until the head of the answer came."""
        self._events = EventParser()
        self._decode = _DECODER.decode
        self._error_body = bytearray()

    def feed(self, data: bytes, received_s: float) -> None:
        """Take a piece of the body that was received at `received_s`."""
        if self.status != 200:
            self._error_body += data[: MAX_ERROR_BYTES - len(self._error_body)]
            return
        try:
            events = self._events.feed(data)
        except EventTooLong as error:
            self.record.fail(ErrorKind.MALFORMED, str(error))
            return
        for event in events:
            self._take(event, received_s)

    def finish(self, now_s: float) -> None:
        """Judge the answer: the body is over, properly or not."""
        record = self.record
        if record.end_s == 0.0:
            record.end_s = now_s
        if self.status == 0:
            record.fail(ErrorKind.DISCONNECTED, "the connection ended before an answer")
        elif self.status != 200:
            record.fail(f"http_{self.status}", describe_error(bytes(self._error_body)))
        elif not record.is_done and not record.token_times and self._events.num_pending_bytes:
            record.fail(ErrorKind.MALFORMED, "the answer is not an event stream")
        elif not record.is_done:
            record.fail(
                ErrorKind.CUT, f"the stream ended after {len(record.token_times)} chunks without [DONE]"
            )

    def _take(self, event: bytes, received_s: float) -> None:
        record = self.record
        if event == b"[DONE]":
            record.is_done = True
            record.end_s = received_s
            return
        try:
            chunk = self._decode(event)
        except msgspec.DecodeError as error:
            record.fail(ErrorKind.MALFORMED, f"an event that is not a chunk: {error}")
            return
        if chunk.error is not None:
            record.fail(ErrorKind.ERROR_EVENT, describe_error(event))
        for choice in chunk.choices:
            if choice.text or (choice.delta is not None and _has_output(choice.delta)):
                record.token_times.append(received_s)
                break
        usage = chunk.usage
        if usage is not None:
            record.num_prompt_tokens = usage.prompt_tokens
            record.num_completion_tokens = usage.completion_tokens
            if usage.prompt_tokens_details is not None:
                record.num_cached_tokens = usage.prompt_tokens_details.cached_tokens


_DECODER = msgspec.json.Decoder(_Chunk)


def describe_error(body: bytes) -> str:
    """Return the message of an error in OpenAI's shape, else the beginning of the body."""
    try:
        tree = msgspec.json.decode(body)
    except msgspec.DecodeError:
        tree = None
    if isinstance(tree, dict):
        error = tree.get("error", tree)
        message = error.get("message") if isinstance(error, dict) else error
        if isinstance(message, str) and message:
            return message[:MAX_DETAIL_CHARACTERS]
    text = " ".join(body.decode("utf-8", "replace").split())
    return text[:MAX_DETAIL_CHARACTERS] or "no body"


def _has_output(delta: _Delta) -> bool:
    if delta.content or delta.reasoning_content or delta.reasoning:
        return True
    return len(bytes(delta.tool_calls)) > 2 and bytes(delta.tool_calls) != b"null"
