"""Server-sent events of streamed answers, as bytes. Everything that does not change is encoded once.

A frame equals `data: ` + JSON of OpenAI's chunk object + a blank line. Must not know tokens or sockets.
Source: https://platform.openai.com/docs/api-reference/chat/streaming, and HTML's server-sent events.
"""

from __future__ import annotations

import msgspec

from headrace.api.openai import ChatLogprobs, CompletionLogprobs, Usage, describe_error
from headrace.errors import RequestError

DONE = b"data: [DONE]\n\n"
_encode = msgspec.json.Encoder().encode
Logprobs = ChatLogprobs | CompletionLogprobs


class StreamFrames:
    """The frames of one streamed answer. `is_chat` chooses the chunk's shape."""

    __slots__ = ("_chunk_start", "_heads", "_is_chat", "_tail", "_usage_null")

    def __init__(
        self, answer_id: str, created: int, model: str, fingerprint: str, *, is_chat: bool, has_usage: bool
    ) -> None:
        kind = "chat.completion.chunk" if is_chat else "text_completion"
        self._is_chat = is_chat
        self._chunk_start = (
            b'data: {"id":%b,"object":"%b","created":%d,"model":%b,"system_fingerprint":%b,'
            % (
                _encode(answer_id),
                kind.encode(),
                created,
                _encode(model),
                _encode(fingerprint),
            )
        )
        # With include_usage every chunk but the last says that its usage is null.
        self._usage_null = b',"usage":null' if has_usage else b""
        close = b"}" if is_chat else b""
        self._tail = close + b',"logprobs":null,"finish_reason":null}]%b}\n\n' % self._usage_null
        self._heads: dict[int, bytes] = {}

    def role(self, index: int) -> bytes:
        """Return the frame that opens a chat choice; nothing for completions."""
        if not self._is_chat:
            return b""
        return b'%b"choices":[{"index":%d,"delta":{"role":"assistant","content":""%b' % (
            self._chunk_start,
            index,
            self._tail,
        )

    def text(self, index: int, text: str) -> bytes:
        """Return the frame of a piece of text. The hot path."""
        head = self._heads.get(index)
        if head is None:
            head = self._heads[index] = self._text_head(index)
        return head + _encode(text) + self._tail

    def text_with_logprobs(self, index: int, text: str, logprobs: Logprobs) -> bytes:
        """Return the frame of a piece of text with its tokens' logprobs."""
        close = b"}" if self._is_chat else b""
        return b'%b%b%b,"logprobs":%b,"finish_reason":null}]%b}\n\n' % (
            self._text_head(index),
            _encode(text),
            close,
            _encode(logprobs),
            self._usage_null,
        )

    def finish(self, index: int, reason: str) -> bytes:
        """Return the frame that ends a choice."""
        delta = b'"delta":{}' if self._is_chat else b'"text":""'
        return b'%b"choices":[{"index":%d,%b,"logprobs":null,"finish_reason":%b}]%b}\n\n' % (
            self._chunk_start,
            index,
            delta,
            _encode(reason),
            self._usage_null,
        )

    def usage(self, usage: Usage) -> bytes:
        """Return the frame that `stream_options.include_usage` asks for."""
        return b'%b"choices":[],"usage":%b}\n\n' % (self._chunk_start, _encode(usage))

    def _text_head(self, index: int) -> bytes:
        field = b'"delta":{"content":' if self._is_chat else b'"text":'
        return b'%b"choices":[{"index":%d,%b' % (self._chunk_start, index, field)


def error_frame(error: RequestError) -> bytes:
    """Return the frame that ends a stream in an error. No [DONE] may follow it."""
    return b"data: %b\n\n" % _encode(describe_error(error))
