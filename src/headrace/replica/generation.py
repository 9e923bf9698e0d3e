"""From a generation request's body to an answer in the engine: parse, check, render, tokenize, submit.

Owns requests until they are answers, and the set of open answers. Must not know sockets or frames.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec

from headrace.api.messages import EngineReady, GenerationRequest, SamplingParams, TerminalState
from headrace.api.openai import (
    ChatCompletionRequest,
    ChatMessage,
    CompletionRequest,
    GenerationFields,
    RequestDecoder,
    refuse_unsupported,
)
from headrace.clock import Clock
from headrace.errors import InvalidRequest, Overloaded, RequestError
from headrace.replica.answer import Answer, AnswerServices, GenerationFailed, TextRules
from headrace.replica.answer_shape import AnswerShape
from headrace.replica.chat import flatten_messages
from headrace.replica.grammar_checker import GrammarChecker
from headrace.replica.http_messages import HttpRequest
from headrace.replica.http_responder import Responder
from headrace.replica.ledger import RequestRecord
from headrace.replica.prompt_caching import PromptCaching
from headrace.replica.request_head import open_record, place_of
from headrace.replica.served_models import ServedModels
from headrace.replica.structured_output import read_form
from headrace.replica.text_model import PromptEncoder, TextModel
from headrace.replica.validate import (
    ModelLimits,
    build_sampling,
    check_stream_options,
    check_token_ids,
    count_choices,
    parse_stops,
    split_prompts,
)

CHAT_PATH = "/v1/chat/completions"
COMPLETIONS_PATH = "/v1/completions"
_log = logging.getLogger(__name__)


class _ClientGone(Exception):
    """The client left while its request was prepared."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """What all prompts of one request became."""

    token_ids: list[list[int]]
    stops: list[str]
    sampling: SamplingParams
    choices_per_prompt: int
    grammar: str
    """What each answer must match; empty: anything."""
    adapter: str
    """Empty: the model itself."""


class ServingEngine(Protocol):
    """The engine that answers will use."""

    @property
    def state(self) -> str: ...

    @property
    def info(self) -> EngineReady | None: ...

    def why_not_ready(self) -> str: ...


class RemoteSide(Protocol):
    """What a durable front does with each request."""

    async def wait_known(self) -> None:
        """Wait until it is known what requests are checked against, for a while."""
        ...

    def mark(
        self, requests: Sequence[GenerationRequest], record: RequestRecord, place: str, body: bytes
    ) -> list[GenerationRequest]:
        """Return the requests with what their host must know."""
        ...


class Generator:
    """Takes generation requests for one endpoint."""

    def __init__(
        self,
        models: ServedModels,
        max_open: int,
        fingerprint: str,
        services: AnswerServices,
        engine: ServingEngine,
        clock: Clock,
    ) -> None:
        self.models = models
        self._max_open = max_open
        self._fingerprint = fingerprint
        self._services = services
        self._engine = engine
        self._clock = clock
        self._chat_decoder = RequestDecoder(ChatCompletionRequest)
        self._completion_decoder = RequestDecoder(CompletionRequest)
        self._model: TextModel | None = None
        self._encoder: PromptEncoder | None = None
        self._caching: PromptCaching | None = None
        self._grammars: GrammarChecker | None = None
        self._preparing: set[asyncio.Task[None]] = set()
        self._answers: set[Answer] = set()
        self._has_failed_open = False
        self.remote: RemoteSide | None = None
        """Of a durable front: its engines are replicas'."""
        self.is_closed = False
        """Every router knows that this replica leaves: refuse what still comes, unless it may be held."""
        self.may_hold: Callable[[bool], bool] = lambda is_leaving: False
        """Whether requests may wait for an engine here (`policy.resumption.may_hold`)."""

    def __repr__(self) -> str:
        return f"Generator({len(self._preparing)} preparing, {len(self._answers)} answers)"

    def set_model(
        self,
        model: TextModel,
        encoder: PromptEncoder,
        caching: PromptCaching,
        grammars: GrammarChecker | None = None,
    ) -> None:
        """The model's text side is loaded; requests can be taken once the engine is ready too.

        `grammars`: None where the engine knows none.
        """
        self._model, self._encoder, self._caching, self._grammars = model, encoder, caching, grammars

    @property
    def num_preparing(self) -> int:
        """Requests that are being read: the engine does not have them yet."""
        return len(self._preparing)

    def has_model(self) -> bool:
        return self._model is not None

    def handle(self, request: HttpRequest, responder: Responder) -> None:
        """Take a request to CHAT_PATH or COMPLETIONS_PATH. It is answered through `responder`."""
        self._forget_ended()
        record = open_record(request)
        self._services.ledger.open(record)
        headers = f"x-request-id: {record.client_request_id}\r\n"
        task = asyncio.get_running_loop().create_task(self._run(request, responder, record, headers))
        self._preparing.add(task)
        task.add_done_callback(self._preparing.discard)

    async def _run(
        self, request: HttpRequest, responder: Responder, record: RequestRecord, headers: str
    ) -> None:
        ledger = self._services.ledger
        try:
            answer = await self._prepare(request, responder, record, headers)
        except _ClientGone:
            record.finish_reason = "aborted"
            ledger.close(record, TerminalState.ABORTED)
        except RequestError as error:
            record.status, record.error, record.finish_reason = error.status, error.message, "refused"
            ledger.close(record, TerminalState.REFUSED)
            if self.is_closed:
                responder.close_after()
            responder.send_error(error, headers)
        except Exception as error:
            record.status, record.finish_reason = 500, "error"
            record.error = f"{type(error).__name__} while the request was prepared"
            ledger.close(record, TerminalState.FAILED)
            _log.exception("request %s could not be prepared", record.request_id)
            responder.send_error(GenerationFailed("the server failed at this request; see its log"), headers)
        else:
            self._answers.add(answer)

    async def _prepare(
        self, request: HttpRequest, responder: Responder, record: RequestRecord, headers: str
    ) -> Answer:
        """Return the running answer. Raises RequestError and _ClientGone; then nothing runs."""
        if self._has_failed_open or (self.is_closed and not self.may_hold(True)):
            raise _leaving()
        if self.remote is not None:
            await self.remote.wait_known()
        limits = self._limits(may_hold=self.is_closed or self.may_hold(False))
        # This request is counted as open already.
        if self._services.ledger.num_open > self._max_open:
            raise Overloaded(
                f"{self._max_open} requests are open, which is all that this replica takes", retry_after_s=1.0
            )
        is_chat = request.path == CHAT_PATH
        decoder: RequestDecoder[Any] = self._chat_decoder if is_chat else self._completion_decoder
        fields: GenerationFields = decoder.decode(request.body)
        self.models.check(fields.model)
        refuse_unsupported(fields)
        has_usage = check_stream_options(fields)
        record.is_stream = bool(fields.stream)
        prompt = await self._read_prompt(fields, limits)
        if responder.is_done:
            raise _ClientGone
        if self._has_failed_open:
            raise _leaving()
        record.num_prompt_tokens = sum(map(len, prompt.token_ids))
        shape = AnswerShape(
            answer_id=f"{'chatcmpl' if is_chat else 'cmpl'}-{record.request_id}",
            created=int(self._clock.wall_s()),
            model=fields.model,
            fingerprint=self._fingerprint,
            is_chat=is_chat,
            is_stream=record.is_stream,
            has_usage=has_usage,
            choices_per_prompt=prompt.choices_per_prompt,
        )
        answer = Answer(shape, record, responder, self._services, headers)
        assert self._model is not None
        rules = TextRules(self._model.tokenizer.token_bytes, prompt.stops)
        requests = self._engine_requests(record, prompt)
        if self.remote is not None:
            requests = self.remote.mark(requests, record, place_of(request), request.body)
        answer.submit(requests, rules)
        assert self._caching is not None
        if len(prompt.token_ids) == 1:  # of several, the head does not say where each begins
            self._caching.admit(requests[0], request.body)
        return answer

    def _limits(self, *, may_hold: bool = False) -> ModelLimits:
        engine = self._engine
        if not (engine.state == "ready" or may_hold) or engine.info is None:
            raise Overloaded(engine.why_not_ready(), retry_after_s=1.0)
        if self._model is None:
            raise Overloaded("the model's tokenizer is being loaded; try again shortly", retry_after_s=1.0)
        return ModelLimits(engine.info.vocab_size, engine.info.max_context_tokens)

    async def _read_prompt(self, fields: GenerationFields, limits: ModelLimits) -> Prompt:
        stops = parse_stops(fields.stop)
        grammar = await self._read_grammar(fields)
        if isinstance(fields, ChatCompletionRequest):
            n = count_choices(fields, 1)
            token_ids = [await self.encode_chat(fields.messages)]
        else:
            assert isinstance(fields, CompletionRequest)
            prompts = split_prompts(fields.prompt)
            n = count_choices(fields, len(prompts))
            num_characters = sum(map(len, prompts))
            token_ids = [await self._encode_prompt(prompt, limits, num_characters) for prompt in prompts]
        longest = max(map(len, token_ids))
        sampling = build_sampling(fields, limits, longest, int.from_bytes(os.urandom(7), "big"))
        return Prompt(token_ids, stops, sampling, n, grammar, self.models.adapter_of(fields.model))

    async def _read_grammar(self, fields: GenerationFields) -> str:
        """Return what the answer must match. Raises InvalidRequest, and Overloaded if there is no time."""
        form = read_form(fields)
        if form is None:
            return ""
        if self._grammars is None:
            raise InvalidRequest(
                f"{form.param} needs an engine that can be held to a form; this one, which only simulates, "
                "cannot. Leave it out",
                param=form.param,
                code="unsupported_parameter",
            )
        return await self._grammars.compile(form)

    async def encode_chat(self, messages: list[ChatMessage]) -> list[int]:
        """Return the token ids of the rendered chat. Raises InvalidRequest."""
        if self._model is None or self._encoder is None:
            raise Overloaded("the model's tokenizer is being loaded; try again shortly", retry_after_s=1.0)
        flat = flatten_messages(messages)
        if self._model.chat_template is None:
            raise InvalidRequest(
                f"the model of {self.models.endpoint!r} has no chat template, so it cannot chat; "
                f"use {COMPLETIONS_PATH}, or serve an instruct model"
            )
        text = self._model.chat_template.render(flat)
        # The template writes the special tokens itself, the first one included.
        token_ids = await self._encoder.encode(text, add_special_tokens=False)
        if not token_ids:
            raise InvalidRequest("the messages make an empty prompt; send some text", param="messages")
        return token_ids

    async def encode_text(
        self, text: str, *, add_special_tokens: bool, num_characters_in_all: int = 0
    ) -> list[int]:
        """Return the token ids of `text`. Raises InvalidRequest; Overloaded while the model loads."""
        if self._encoder is None:
            raise Overloaded("the model's tokenizer is being loaded; try again shortly", retry_after_s=1.0)
        return await self._encoder.encode(
            text, add_special_tokens=add_special_tokens, num_characters_in_all=num_characters_in_all
        )

    def decode_text(self, token_ids: list[int]) -> str:
        """Return the text of `token_ids`. Raises InvalidRequest, and Overloaded as `encode_text`."""
        limits = self._limits()
        assert self._model is not None
        check_token_ids(token_ids, limits.vocab_size, "tokens")
        return self._model.tokenizer.decode(token_ids)

    async def _encode_prompt(
        self, prompt: str | list[int], limits: ModelLimits, num_characters: int
    ) -> list[int]:
        if isinstance(prompt, str):
            token_ids = await self.encode_text(
                prompt, add_special_tokens=True, num_characters_in_all=num_characters
            )
        else:
            check_token_ids(prompt, limits.vocab_size, "prompt")
            token_ids = prompt
        if not token_ids:
            raise InvalidRequest("the prompt has no tokens; send at least one", param="prompt")
        return token_ids

    def _engine_requests(self, record: RequestRecord, prompt: Prompt) -> list[GenerationRequest]:
        base, sampling, n = record.request_id, prompt.sampling, prompt.choices_per_prompt
        total = n * len(prompt.token_ids)
        attempt = 1
        while any(self._services.engine.has_request(_choice_id(base, k, total)) for k in range(total)):
            # The same request came again while its first try is open, after a broken connection for example.
            attempt += 1
            base = f"{record.request_id}~{attempt}"
        assert self._caching is not None
        cache_salt = self._caching.salt_of(record.tenant, prompt.adapter)
        requests = []
        for k in range(total):
            seeded = msgspec.structs.replace(sampling, seed=sampling.seed + k % n)
            token_ids = prompt.token_ids[k // n]
            requests.append(
                GenerationRequest(
                    _choice_id(base, k, total),
                    token_ids,
                    seeded,
                    tenant=record.tenant,
                    cache_salt=cache_salt,
                    lora=prompt.adapter,
                    grammar=prompt.grammar,
                    num_shared_tokens=self._caching.num_shared(token_ids),
                )
            )
        return requests

    # ---- the end

    def fail_open(self) -> None:
        """End everything that is still open, with an error that says to try elsewhere."""
        self._has_failed_open = True
        for answer in list(self._answers):
            answer.fail(_leaving())
        self._answers.clear()

    def _forget_ended(self) -> None:
        if len(self._answers) > 2 * self._services.ledger.num_open + 16:
            self._answers = {answer for answer in self._answers if not answer.has_ended}


def _leaving() -> Overloaded:
    return Overloaded("this replica is leaving; send the request again", retry_after_s=1.0)


def _choice_id(base: str, index: int, total: int) -> str:
    return base if total == 1 else f"{base}#{index}"
