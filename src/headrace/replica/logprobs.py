"""Log probabilities of tokens in OpenAI's two shapes, matched to the pieces of text that are sent.

Owns the entries of tokens whose text is still held back. Must not know frames or stop strings.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from headrace.api.messages import TokenLogprobs
from headrace.api.openai import ChatLogprob, ChatLogprobs, CompletionLogprobs, TopLogprob
from headrace.replica.text import TokenBytes


@dataclass(frozen=True, slots=True)
class LogprobEntry:
    """One token: `offset` is where its text begins in the answer, in characters."""

    offset: int
    token_id: int
    logprobs: TokenLogprobs


class LogprobQueue:
    """Entries of one choice, in order, until their text is sent."""

    def __init__(self, token_bytes: TokenBytes, num_top: int, *, is_chat: bool) -> None:
        self._token_bytes = token_bytes
        self._num_top = num_top
        self._is_chat = is_chat
        self._waiting: deque[LogprobEntry] = deque()

    def add(self, offset: int, token_id: int, logprobs: TokenLogprobs) -> None:
        self._waiting.append(LogprobEntry(offset, token_id, logprobs))

    def take(self, end_offset: int, *, is_last: bool = False) -> list[LogprobEntry]:
        """Remove and return the entries of tokens whose text begins before `end_offset`; all if last."""
        taken: list[LogprobEntry] = []
        while self._waiting and (is_last or self._waiting[0].offset < end_offset):
            taken.append(self._waiting.popleft())
        return taken

    def render(self, entries: Sequence[LogprobEntry]) -> ChatLogprobs | CompletionLogprobs:
        """Return the entries as OpenAI's `logprobs` object."""
        if self._is_chat:
            return ChatLogprobs([self._chat_entry(entry) for entry in entries])
        return CompletionLogprobs(
            tokens=[self._text(entry.token_id) for entry in entries],
            token_logprobs=[entry.logprobs.logprob for entry in entries],
            top_logprobs=[
                {self._text(token_id): value for token_id, value in entry.logprobs.top[: self._num_top]}
                for entry in entries
            ],
            text_offset=[entry.offset for entry in entries],
        )

    def _chat_entry(self, entry: LogprobEntry) -> ChatLogprob:
        top = [
            TopLogprob(self._text(token_id), value, list(self._token_bytes[token_id]))
            for token_id, value in entry.logprobs.top[: self._num_top]
        ]
        token_id = entry.token_id
        return ChatLogprob(
            self._text(token_id), entry.logprobs.logprob, list(self._token_bytes[token_id]), top
        )

    def _text(self, token_id: int) -> str:
        return self._token_bytes[token_id].decode("utf-8", "replace")
