"""What an answer looks like: chat or completion, streamed or whole, with or without usage.

Must not know tokens, sockets or how answers end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec

from headrace.api.openai import (
    AssistantMessage,
    ChatChoice,
    ChatCompletion,
    ChatLogprobs,
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    Usage,
)
from headrace.replica.frames import StreamFrames


@dataclass(frozen=True, slots=True)
class ChoiceText:
    """One complete choice."""

    index: int
    text: str
    logprobs: ChatLogprobs | CompletionLogprobs | None
    finish_reason: str


@dataclass(frozen=True, slots=True)
class AnswerShape:
    """The fixed parts of one answer."""

    answer_id: str
    created: int
    """Seconds since 1970."""
    model: str
    fingerprint: str
    is_chat: bool
    is_stream: bool
    has_usage: bool = False
    """A stream's last chunk carries the usage."""
    choices_per_prompt: int = 1
    frames: StreamFrames | None = field(init=False, default=None)
    """Set for streams."""

    def __post_init__(self) -> None:
        if self.is_stream:
            frames = StreamFrames(
                self.answer_id,
                self.created,
                self.model,
                self.fingerprint,
                is_chat=self.is_chat,
                has_usage=self.has_usage,
            )
            object.__setattr__(self, "frames", frames)

    def encode_whole(self, choices: Sequence[ChoiceText], usage: Usage) -> bytes:
        """Return the JSON of an answer that is not streamed."""
        if self.is_chat:
            return msgspec.json.encode(self._chat_completion(choices, usage))
        return msgspec.json.encode(self._completion(choices, usage))

    def _chat_completion(self, choices: Sequence[ChoiceText], usage: Usage) -> ChatCompletion:
        rows = []
        for choice in choices:
            assert not isinstance(choice.logprobs, CompletionLogprobs)
            message = AssistantMessage("assistant", choice.text)
            rows.append(ChatChoice(choice.index, message, choice.logprobs, choice.finish_reason))
        return ChatCompletion(
            self.answer_id, "chat.completion", self.created, self.model, rows, usage, self.fingerprint
        )

    def _completion(self, choices: Sequence[ChoiceText], usage: Usage) -> Completion:
        rows = []
        for choice in choices:
            assert not isinstance(choice.logprobs, ChatLogprobs)
            rows.append(CompletionChoice(choice.index, choice.text, choice.logprobs, choice.finish_reason))
        return Completion(
            self.answer_id, "text_completion", self.created, self.model, rows, usage, self.fingerprint
        )
