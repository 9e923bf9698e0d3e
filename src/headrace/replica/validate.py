"""From a request's wire fields to sampling parameters, within the model's limits.

Pure. Every refusal says what was got, what is allowed, and names the parameter.
Must not know text, templates or engines.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from headrace.api.messages import SamplingParams
from headrace.api.openai import ChatCompletionRequest, CompletionRequest, GenerationFields
from headrace.errors import InvalidRequest

MAX_CHOICES = 64
"""Most choices of one request: prompts times n."""
MAX_STOPS = 4
MAX_STOP_CHARACTERS = 1024
MAX_TOP_LOGPROBS = 20
_SEED_RANGE = 1 << 63


@dataclass(frozen=True, slots=True)
class ModelLimits:
    """What the engine said about its model."""

    vocab_size: int
    max_context_tokens: int


@dataclass(frozen=True, slots=True)
class _Range:
    """Allowed values of one number: from `least` (exclusive if is_open) to `most`."""

    name: str
    least: float
    most: float
    is_open: bool = False

    def check(self, value: float | None, default: float) -> float:
        if value is None:
            return default
        is_above = value > self.least if self.is_open else value >= self.least
        if not (is_above and value <= self.most):
            above = "greater than" if self.is_open else "at least"
            most = "" if math.isinf(self.most) else f" and at most {self.most:g}"
            raise InvalidRequest(
                f"{self.name} is {value:g}; it must be {above} {self.least:g}{most}", param=self.name
            )
        return value


_TEMPERATURE = _Range("temperature", 0, 2)
_TOP_P = _Range("top_p", 0, 1, is_open=True)
_MIN_P = _Range("min_p", 0, 1)
_PRESENCE_PENALTY = _Range("presence_penalty", -2, 2)
_FREQUENCY_PENALTY = _Range("frequency_penalty", -2, 2)
_REPETITION_PENALTY = _Range("repetition_penalty", 0, 10, is_open=True)
_N = _Range("n", 1, MAX_CHOICES)


def build_sampling(
    request: GenerationFields, limits: ModelLimits, num_prompt_tokens: int, seed: int
) -> SamplingParams:
    """Return the parameters of the request's first choice. `seed`: used if the request brings none.

    `num_prompt_tokens`: of the longest prompt. Raises InvalidRequest.
    """
    max_tokens = choose_max_tokens(request, limits, num_prompt_tokens)
    min_tokens = request.min_tokens or 0
    if not 0 <= min_tokens <= max_tokens:
        raise InvalidRequest(
            f"min_tokens is {min_tokens}; it must be 0 to max_tokens, here {max_tokens}", param="min_tokens"
        )
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=_TEMPERATURE.check(request.temperature, 1.0),
        top_p=_TOP_P.check(request.top_p, 1.0),
        top_k=_check_top_k(request.top_k),
        min_p=_MIN_P.check(request.min_p, 0.0),
        presence_penalty=_PRESENCE_PENALTY.check(request.presence_penalty, 0.0),
        frequency_penalty=_FREQUENCY_PENALTY.check(request.frequency_penalty, 0.0),
        repetition_penalty=_REPETITION_PENALTY.check(request.repetition_penalty, 1.0),
        logit_bias=_parse_logit_bias(request.logit_bias or {}, limits.vocab_size),
        num_logprobs=_count_logprobs(request),
        seed=(seed if request.seed is None else request.seed) % _SEED_RANGE,
        stop_token_ids=_check_stop_token_ids(request.stop_token_ids or [], limits.vocab_size),
        ignore_eos=bool(request.ignore_eos),
        min_tokens=min_tokens,
    )


def choose_max_tokens(request: GenerationFields, limits: ModelLimits, num_prompt_tokens: int) -> int:
    """Return how many tokens may be generated: as asked, or the rest of the context."""
    context = limits.max_context_tokens
    room = context - num_prompt_tokens
    if room < 1:
        raise InvalidRequest(
            f"the prompt has {num_prompt_tokens} tokens and the context holds {context}, of which at least "
            "one must be left for the answer; shorten the prompt",
            param="messages" if isinstance(request, ChatCompletionRequest) else "prompt",
            code="context_length_exceeded",
        )
    name, value = "max_tokens", request.max_tokens
    if isinstance(request, ChatCompletionRequest) and request.max_completion_tokens is not None:
        if value is not None and value != request.max_completion_tokens:
            raise InvalidRequest(
                f"max_tokens is {value} and max_completion_tokens is {request.max_completion_tokens}; "
                "they mean the same, send one of them",
                param="max_completion_tokens",
            )
        name, value = "max_completion_tokens", request.max_completion_tokens
    if value is None:
        return room
    if not 1 <= value <= room:
        raise InvalidRequest(
            f"{name} is {value}; it must be 1 to {room}: the context holds {context} tokens and the prompt "
            f"has {num_prompt_tokens}",
            param=name,
            code="invalid_value" if value < 1 else "context_length_exceeded",
        )
    return value


def parse_stops(stop: str | list[str] | None) -> list[str]:
    """Return the stop strings. Raises InvalidRequest."""
    stops = [] if stop is None else [stop] if isinstance(stop, str) else stop
    if len(stops) > MAX_STOPS:
        raise InvalidRequest(f"stop has {len(stops)} strings; at most {MAX_STOPS} are allowed", param="stop")
    for index, text in enumerate(stops):
        if not 1 <= len(text) <= MAX_STOP_CHARACTERS:
            raise InvalidRequest(
                f"stop string {index} has {len(text)} characters; it must have 1 to {MAX_STOP_CHARACTERS}",
                param="stop",
            )
    return stops


def count_choices(request: GenerationFields, num_prompts: int) -> int:
    """Return n. Raises InvalidRequest if it is out of range or asks for too many choices in all."""
    n = int(_N.check(request.n, 1))
    if n * num_prompts > MAX_CHOICES:
        raise InvalidRequest(
            f"{num_prompts} prompts with n = {n} ask for {n * num_prompts} choices; "
            f"at most {MAX_CHOICES} are allowed in one request",
            param="n",
        )
    return n


def check_stream_options(request: GenerationFields) -> bool:
    """Return whether the stream's last chunk carries the usage. Raises InvalidRequest."""
    if request.stream_options is None:
        return False
    if not request.stream:
        raise InvalidRequest("stream_options needs stream: true", param="stream_options")
    return bool(request.stream_options.include_usage)


def _check_top_k(top_k: int | None) -> int:
    if top_k is None or top_k == -1:
        return 0
    if top_k < 0:
        raise InvalidRequest(
            f"top_k is {top_k}; it must be at least 1, or 0 or -1 for all tokens", param="top_k"
        )
    return top_k


def _count_logprobs(request: GenerationFields) -> int:
    """Return SamplingParams.num_logprobs: -1 for none."""
    if isinstance(request, CompletionRequest):
        name, count, is_wanted = "logprobs", request.logprobs, request.logprobs is not None
    else:
        assert isinstance(request, ChatCompletionRequest)
        name, count, is_wanted = "top_logprobs", request.top_logprobs, bool(request.logprobs)
        if count is not None and not is_wanted:
            raise InvalidRequest("top_logprobs needs logprobs: true", param="top_logprobs")
    if not is_wanted:
        return -1
    if not 0 <= (count or 0) <= MAX_TOP_LOGPROBS:
        raise InvalidRequest(f"{name} is {count}; it must be 0 to {MAX_TOP_LOGPROBS}", param=name)
    return count or 0


def _parse_logit_bias(bias_by_text: dict[str, float], vocab_size: int) -> dict[int, float]:
    bias: dict[int, float] = {}
    for text, value in bias_by_text.items():
        if not text.isascii() or not text.isdigit() or len(text) > 9 or int(text) >= vocab_size:
            raise InvalidRequest(
                f"logit_bias has the key {text[:40]!r}; keys are token ids, 0 to {vocab_size - 1}",
                param="logit_bias",
            )
        if not -100 <= value <= 100:
            raise InvalidRequest(
                f"logit_bias of token {text} is {value:g}; it must be -100 to 100", param="logit_bias"
            )
        bias[int(text)] = value
    return bias


def _check_stop_token_ids(token_ids: list[int], vocab_size: int) -> tuple[int, ...]:
    check_token_ids(token_ids, vocab_size, "stop_token_ids")
    return tuple(token_ids)


def check_token_ids(token_ids: list[int], vocab_size: int, name: str) -> None:
    """Raise InvalidRequest if an id is outside of the vocabulary."""
    if token_ids and not (min(token_ids) >= 0 and max(token_ids) < vocab_size):
        wrong = min(token_ids) if min(token_ids) < 0 else max(token_ids)
        raise InvalidRequest(f"{name} has the token id {wrong}; ids are 0 to {vocab_size - 1}", param=name)


def split_prompts(prompt: str | list[Any]) -> list[str | list[int]]:
    """Return the prompts of a completion request. Raises InvalidRequest."""
    if isinstance(prompt, str):
        return [prompt]
    if _is_token_ids(prompt):
        return [prompt]
    if prompt and all(isinstance(part, str) for part in prompt):
        return list(prompt)
    if prompt and all(isinstance(part, list) and _is_token_ids(part) for part in prompt):
        return list(prompt)
    raise InvalidRequest(
        "prompt must be a text, a list of texts, a list of token ids, or a list of lists of token ids, "
        "and not empty",
        param="prompt",
        code="invalid_type",
    )


def _is_token_ids(value: list[Any]) -> bool:
    return bool(value) and all(type(part) is int for part in value)
