"""One generation request's answer: its choices, their text so far, and how it is sent.

Owns the stream: one write per step, and exactly one end, however the answer ends. Each choice is one engine
request and keeps its prompt and token ids, so that it can be continued elsewhere.
Must not know routes, validation or how requests are parsed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from headrace.api.messages import GenerationRequest, StepOutput, TerminalState, TokenLogprobs
from headrace.api.openai import PromptTokensDetails, Usage
from headrace.errors import RequestError
from headrace.observability.front_metrics import FrontMetrics
from headrace.replica.answer_shape import AnswerShape, ChoiceText
from headrace.replica.frames import DONE, error_frame
from headrace.replica.http_responder import Responder
from headrace.replica.ledger import Ledger, RequestRecord
from headrace.replica.logprobs import LogprobEntry, LogprobQueue
from headrace.replica.text import StopStrings, TextDecoder, TokenBytes


class GenerationFailed(RequestError):
    """The engine refused or broke off one request."""

    code = "generation_failed"


class AnswerEngine(Protocol):
    """The engine, as answers see it."""

    def submit(self, request: GenerationRequest, stream: Choice) -> None:
        """Take a request. Raises Overloaded."""
        ...

    def abort(self, request_id: str) -> None:
        """Take it back; unknown ids are ignored."""
        ...

    def has_request(self, request_id: str) -> bool: ...

    def on_engine_lost(self, stream: Choice, reason: str) -> None:
        """The engine is gone, and this stream was in it: continue it, or let it `fail`."""
        ...


@dataclass(frozen=True, slots=True)
class AnswerServices:
    """What every answer of a front uses."""

    engine: AnswerEngine
    ledger: Ledger
    metrics: FrontMetrics


@dataclass(frozen=True, slots=True)
class TextRules:
    """How an answer's tokens become text."""

    token_bytes: TokenBytes
    stops: Sequence[str] = ()


class Choice:
    """One of an answer's choices: an engine request, and the text it gave."""

    __slots__ = (
        "_answer",
        "_decoder",
        "_frames",
        "_is_plain",
        "_last_token_s",
        "_logprobs",
        "_metrics",
        "_num_characters",
        "_num_sent",
        "_sent_entries",
        "_stops",
        "_texts",
        "engine_ns",
        "finish_reason",
        "index",
        "num_cached_tokens",
        "request",
        "token_ids",
    )

    def __init__(self, answer: Answer, index: int, request: GenerationRequest, rules: TextRules) -> None:
        self._answer = answer
        self._metrics = answer.services.metrics
        self._frames = answer.shape.frames
        self.index = index
        self.request = request
        self.token_ids: list[int] = []
        """All tokens so far: with the prompt, what it takes to continue elsewhere."""
        self.finish_reason = ""
        self.num_cached_tokens = 0
        self.engine_ns = 0
        """Engine time so far, as far as the engine told."""
        token_bytes = rules.token_bytes
        self._decoder = TextDecoder(token_bytes)
        self._stops = StopStrings(rules.stops) if rules.stops else None
        self._texts: list[str] = []
        self._last_token_s = 0.0
        num_top = request.sampling.num_logprobs
        is_chat = answer.shape.is_chat
        self._logprobs = LogprobQueue(token_bytes, num_top, is_chat=is_chat) if num_top >= 0 else None
        self._sent_entries: list[LogprobEntry] = []
        self._num_characters = 0
        """Characters decoded, and characters sent: the difference is held back."""
        self._num_sent = 0
        self._is_plain = self._stops is None and self._logprobs is None
        """What a step gives can go out as it is."""

    def result(self) -> ChoiceText:
        """Return the whole choice, for an answer that is not streamed."""
        logprobs = None if self._logprobs is None else self._logprobs.render(self._sent_entries)
        return ChoiceText(self.index, "".join(self._texts), logprobs, self.finish_reason)

    # ---- what the engine client tells

    def on_output(self, output: StepOutput, now_s: float) -> bool:
        answer = self._answer
        if answer.has_ended:
            return False
        token_ids, reason = output.token_ids, output.finish_reason
        self.engine_ns = max(self.engine_ns, output.engine_ns)  # a refusal has none
        if len(token_ids) > 1 and self._stops is not None:
            return self._take_one_by_one(output, now_s)
        if reason == "error" or reason == "aborted":
            answer.fail(
                GenerationFailed(f"the engine could not go on with this request: {output.error or reason}")
            )
            return False
        text = ""
        if token_ids:
            metrics = self._metrics
            if self.token_ids:
                if now_s > self._last_token_s:  # tokens of one step come together
                    metrics.inter_token_latency.observe(now_s - self._last_token_s)
            else:
                self.num_cached_tokens = output.num_cached_tokens
                answer.on_first_token(now_s)
            self._last_token_s = now_s
            self.token_ids += token_ids
            metrics.num_output_tokens += len(token_ids)
            if self._logprobs is None:
                text = self._decoder.feed(token_ids)
            else:
                text = self._feed_with_logprobs(token_ids, output.logprobs or [])
        if reason is not None or not self._is_plain:
            self._conclude(text, reason)
        elif not text:
            return False
        elif answer.write_alone is not None and self._frames is not None:
            # The usual case, and the hot path: nothing else of this step goes with it.
            answer.write_alone(b"", self._frames.text(self.index, text))
            return False
        else:
            self._send(text)
        return True

    def _take_one_by_one(self, output: StepOutput, now_s: float) -> bool:
        """Take tokens as if each came in its own step: none behind a stop string is part of the answer."""
        logprobs = output.logprobs or []
        last = len(output.token_ids) - 1
        for index, token_id in enumerate(output.token_ids):
            if self.finish_reason:
                break
            single = StepOutput(
                output.request_id,
                [token_id],
                output.finish_reason if index == last else None,
                logprobs[index : index + 1],
                output.num_cached_tokens,
                output.error,
            )
            self.on_output(single, now_s)
        return True

    def _feed_with_logprobs(self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs]) -> str:
        assert self._logprobs is not None
        whole = ""
        for token_id, entry in zip(token_ids, logprobs, strict=False):
            self._logprobs.add(self._num_characters, token_id, entry)
            text = self._decoder.feed([token_id])
            self._num_characters += len(text)
            whole += text
        return whole

    def _conclude(self, text: str, reason: str | None) -> None:
        """Take a piece of text through stop strings and logprobs, and finish if this is the end."""
        stops, is_stopped = self._stops, False
        if reason is not None:
            text += self._decoder.finish()
        if stops is not None:
            text = stops.feed(text)
            is_stopped = stops.found is not None
            if reason is not None and not is_stopped:
                text += stops.finish()
        self._num_sent += len(text)
        if self._logprobs is None:
            if text:
                self._send(text)
        else:
            is_last = reason is not None and not is_stopped
            entries = self._logprobs.take(self._num_sent, is_last=is_last)
            if text or entries:
                self._send_with_logprobs(text, entries)
        if is_stopped:
            if reason is None:
                self._answer.services.engine.abort(self.request.request_id)
            reason = "stop"
        if reason is not None:
            self.finish_reason = reason
            self._answer.on_choice_finished(self)

    def _send(self, text: str) -> None:
        frames = self._frames
        if frames is None:
            self._texts.append(text)
        else:
            self._answer.pending.append(frames.text(self.index, text))

    def _send_with_logprobs(self, text: str, entries: list[LogprobEntry]) -> None:
        assert self._logprobs is not None
        frames = self._frames
        if frames is None:
            self._texts.append(text)
            self._sent_entries += entries
        else:
            rendered = self._logprobs.render(entries)
            self._answer.pending.append(frames.text_with_logprobs(self.index, text, rendered))

    def flush(self) -> None:
        self._answer.flush()

    def on_engine_lost(self, reason: str) -> None:
        if not self._answer.has_ended:
            self._answer.services.engine.on_engine_lost(self, reason)

    def on_resumed(self, host: str) -> None:
        """It goes on in the engine of the replica `host`; empty: in its own."""
        self._answer.on_resumed(host)

    def fail(self, error: RequestError) -> None:
        """It cannot go on, and so cannot the answer."""
        self._answer.fail(error)

    def on_broken(self) -> None:
        self._answer.fail(GenerationFailed("the server failed at this request; see its log"))


class Answer:
    """One answer. Born with its choices; `submit` starts it."""

    def __init__(
        self,
        shape: AnswerShape,
        record: RequestRecord,
        responder: Responder,
        services: AnswerServices,
        headers: str,
    ) -> None:
        self.shape = shape
        self.services = services
        self.choices: list[Choice] = []
        self.pending: list[bytes] = []
        """Frames of the running step."""
        self.has_ended = False
        self._record = record
        self._responder = responder
        self._headers = headers
        self._head = b"" if shape.frames is None else responder.start(headers)
        """Sent with the first frame, so that until then an error can still be an HTTP status."""
        self._is_started = False
        self._num_unfinished = 0
        self.write_alone: Callable[[bytes, bytes], None] | None = None
        """Takes a frame at once: of a stream that has begun, and has one choice."""

    def __repr__(self) -> str:
        state = "ended" if self.has_ended else f"{self._num_unfinished} running"
        return f"Answer({self._record.request_id}, {len(self.choices)} choices, {state})"

    def submit(self, requests: Sequence[GenerationRequest], rules: TextRules) -> None:
        """Hand all choices to the engine. Raises Overloaded; then nothing was handed over."""
        self.choices = [Choice(self, index, request, rules) for index, request in enumerate(requests)]
        self._num_unfinished = len(self.choices)
        self._responder.on_gone = self._on_client_gone
        for choice in self.choices:
            self.services.engine.submit(choice.request, choice)

    def on_first_token(self, now_s: float) -> None:
        """A choice got its first token."""
        record = self._record
        if not record.first_token_s:
            record.first_token_s = now_s
            self.services.metrics.time_to_first_token.observe(now_s - record.arrived_s)

    def on_resumed(self, host: str) -> None:
        """A choice goes on in another engine, or in its own after a restart."""
        record = self._record
        record.num_resumptions += 1
        if host:
            record.hosts.append(host)

    def on_choice_finished(self, choice: Choice) -> None:
        """A choice is complete; with the last one, so is the answer."""
        self._num_unfinished -= 1
        frames = self.shape.frames
        if frames is not None:
            self.pending.append(frames.finish(choice.index, choice.finish_reason))
        if self._num_unfinished:
            return
        if frames is None:
            # Not at flush: an answer that is not streamed has nothing pending.
            body = self.shape.encode_whole([choice.result() for choice in self.choices], self._usage())
            self._end(TerminalState.FINISHED, 200, choice.finish_reason)
            self._responder.send(200, body, self._headers)
            return
        if self.shape.has_usage:
            self.pending.append(frames.usage(self._usage()))
        self.pending.append(DONE)

    def flush(self) -> None:
        """Write what the step gave, at once; end the stream if it is complete."""
        if not self.pending or self.has_ended:
            return
        data = self._take_pending()
        if self._num_unfinished:
            self._responder.write(self._head, data)
            self._head = b""
            if len(self.choices) == 1:
                self.write_alone = self._responder.write
        else:
            self._end(TerminalState.FINISHED, 200, self.choices[0].finish_reason)
            self._responder.end(self._head, data)

    def _take_pending(self) -> bytes:
        pending = self.pending
        if not self._is_started:
            self._is_started = True
            frames = self.shape.frames
            assert frames is not None
            pending[:0] = [frames.role(choice.index) for choice in self.choices]
        data = pending[0] if len(pending) == 1 else b"".join(pending)
        pending.clear()
        return data

    def _usage(self) -> Usage:
        num_prompt, num_output = self._record.num_prompt_tokens, self._num_output_tokens()
        cached = PromptTokensDetails(self._num_cached_tokens())
        return Usage(num_prompt, num_output, num_prompt + num_output, cached)

    def _num_output_tokens(self) -> int:
        return sum(len(choice.token_ids) for choice in self.choices)

    def _num_cached_tokens(self) -> int:
        # Of the choices that share a prompt, the first one says what was cached before this request.
        per_prompt = self.shape.choices_per_prompt
        return sum(choice.num_cached_tokens for choice in self.choices[::per_prompt])

    # ---- ends

    def fail(self, error: RequestError) -> None:
        """End the answer with `error`: as an HTTP status if nothing was sent yet, else as an error event."""
        if self.has_ended:
            return
        self._abort_choices()
        is_started = self._is_started
        data = self._take_pending() if self.pending and is_started else b""
        self._end(TerminalState.FAILED, 200 if is_started else error.status, "error", error.message)
        if is_started:
            self._responder.end(b"", data + error_frame(error))
        else:
            self._responder.send_error(error, self._headers)

    def _on_client_gone(self) -> None:
        if self.has_ended:
            return
        self._abort_choices()
        self._end(TerminalState.ABORTED, 200 if self._is_started else 0, "aborted")

    def _abort_choices(self) -> None:
        for choice in self.choices:
            if not choice.finish_reason:
                self.services.engine.abort(choice.request.request_id)

    def _end(self, state: TerminalState, status: int, finish_reason: str, error: str = "") -> None:
        self.has_ended = True
        self._responder.on_gone = None
        record = self._record
        record.status, record.finish_reason, record.error = status, finish_reason, error
        record.num_output_tokens = self._num_output_tokens()
        record.num_cached_tokens = self._num_cached_tokens()
        record.engine_s = sum(choice.engine_ns for choice in self.choices) * 1e-9
        self.services.ledger.close(record, state)
