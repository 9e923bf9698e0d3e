"""OpenAI's wire types, as far as headrace speaks them: chat completions, completions, models, errors.

Source of the shapes: https://platform.openai.com/docs/api-reference. Owns decoding and what a decoding error
says. Must not know models, limits or how an answer is made. Unknown fields are ignored, as OpenAI-compatible
servers do; known fields that cannot be honoured are refused by `refuse_unsupported`.
"""

from __future__ import annotations

import re
from typing import Any, Generic, TypeVar

import msgspec

from headrace.errors import InvalidRequest, RequestError

RequestT = TypeVar("RequestT")


# ---- requests ----------------


class StreamOptions(msgspec.Struct, frozen=True):
    include_usage: bool | None = None


class GenerationFields(msgspec.Struct, frozen=True, kw_only=True):
    """What chat completions and completions share. None: not sent, or sent as null."""

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    user: str | None = None
    response_format: Any = None
    # Extensions that OpenAI-compatible servers agree on.
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int | None = None
    """Suppresses end and stop tokens; a stop string ends the answer all the same."""
    ignore_eos: bool | None = None
    stop_token_ids: list[int] | None = None
    # vLLM's words for what an answer must match; `replica.structured_output` reads them.
    structured_outputs: Any = None
    guided_json: Any = None
    guided_regex: Any = None
    guided_choice: Any = None
    guided_grammar: Any = None
    # Known, and refused when set.
    guided_whitespace_pattern: Any = None


class ChatMessage(msgspec.Struct, frozen=True):
    role: str
    content: str | list[dict[str, Any]] | None = None
    name: str | None = None
    tool_calls: Any = None
    function_call: Any = None


class ChatCompletionRequest(GenerationFields, frozen=True, kw_only=True):
    messages: list[ChatMessage]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: Any = None
    functions: Any = None
    audio: Any = None
    prediction: Any = None
    web_search_options: Any = None


class CompletionRequest(GenerationFields, frozen=True, kw_only=True):
    prompt: str | list[Any]
    """A text, several texts, token ids, or several lists of token ids."""
    logprobs: int | None = None
    echo: bool | None = None
    suffix: str | None = None
    best_of: int | None = None


class TokenizeRequest(msgspec.Struct, frozen=True):
    model: str | None = None
    prompt: str | None = None
    messages: list[ChatMessage] | None = None
    add_special_tokens: bool = True


class DetokenizeRequest(msgspec.Struct, frozen=True):
    tokens: list[int]
    model: str | None = None


_ALWAYS_REFUSED = (
    ("tools", "tools are not supported yet; leave tools out"),
    ("functions", "functions are not supported yet; leave functions out"),
    ("audio", "audio is not supported; leave audio out"),
    ("prediction", "predicted outputs are not supported; leave prediction out"),
    ("web_search_options", "web search is not supported; leave web_search_options out"),
    ("guided_whitespace_pattern", "not supported; put x-guidance.whitespace_pattern into the schema"),
    ("suffix", "suffix is not supported; leave suffix out"),
    ("echo", "echo is not supported; leave echo out, or put the prompt before the answer yourself"),
)


def refuse_unsupported(request: GenerationFields) -> None:
    """Raise InvalidRequest if a field asks for something that headrace knows and cannot do."""
    for name, message in _ALWAYS_REFUSED:
        if getattr(request, name, None):
            raise InvalidRequest(message, param=name, code="unsupported_parameter")
    best_of = getattr(request, "best_of", None)
    if best_of is not None and best_of != (request.n or 1):
        raise InvalidRequest(
            f"best_of is {best_of}; choosing among more answers than n is not supported, leave best_of out",
            param="best_of",
            code="unsupported_parameter",
        )


# ---- answers ----------------


class PromptTokensDetails(msgspec.Struct, frozen=True):
    cached_tokens: int = 0


class Usage(msgspec.Struct, frozen=True):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class TopLogprob(msgspec.Struct, frozen=True):
    token: str
    logprob: float
    bytes: list[int]


class ChatLogprob(msgspec.Struct, frozen=True):
    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct, frozen=True):
    content: list[ChatLogprob]
    refusal: None = None


class CompletionLogprobs(msgspec.Struct, frozen=True):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class AssistantMessage(msgspec.Struct, frozen=True):
    role: str
    content: str
    refusal: None = None


class ChatChoice(msgspec.Struct, frozen=True):
    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: str


class CompletionChoice(msgspec.Struct, frozen=True):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: str


class ChatCompletion(msgspec.Struct, frozen=True):
    id: str
    object: str
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    system_fingerprint: str


class Completion(msgspec.Struct, frozen=True):
    id: str
    object: str
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage
    system_fingerprint: str


class ModelCard(msgspec.Struct, frozen=True):
    id: str
    object: str
    created: int
    owned_by: str
    root: str
    max_model_len: int | None


class ModelList(msgspec.Struct, frozen=True):
    object: str
    data: list[ModelCard]


class ErrorDetail(msgspec.Struct, frozen=True):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(msgspec.Struct, frozen=True):
    error: ErrorDetail


def describe_error(error: RequestError) -> ErrorAnswer:
    """Return `error` in OpenAI's shape."""
    return ErrorAnswer(ErrorDetail(error.message, error.type, error.param, error.code))


# ---- decoding ----------------

_AT_PATH = re.compile(r"^(?P<what>.*?)(?: - at `(?P<path>[^`]*)`)?$", re.DOTALL)
_MISSING_FIELD = re.compile(r"missing required field `(?P<name>[^`]+)`")


class RequestDecoder(Generic[RequestT]):
    """Decodes one kind of request body. Raises InvalidRequest that names the field, what was got and what is
    allowed."""

    def __init__(self, request_type: type[RequestT]) -> None:
        self._decoder = msgspec.json.Decoder(request_type)

    def decode(self, body: bytes) -> RequestT:
        """Return the request in `body` (JSON text in UTF-8)."""
        if not body:
            raise InvalidRequest("the body is empty; send a JSON object", code="invalid_json")
        try:
            return self._decoder.decode(body)
        except msgspec.ValidationError as error:
            raise _explain_mismatch(str(error)) from None
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise InvalidRequest(
                f"the body is not valid JSON: {error}; send a JSON object", code="invalid_json"
            ) from None
        except RecursionError:
            raise InvalidRequest("the body is nested too deeply", code="invalid_json") from None


def _explain_mismatch(text: str) -> InvalidRequest:
    """Turn msgspec's `Expected `int`, got `str` - at `$.n`` into an error that names the parameter."""
    match = _AT_PATH.match(text)
    assert match is not None, "the pattern matches every text"
    what, path = match["what"], (match["path"] or "$").removeprefix("$").removeprefix(".")
    missing = _MISSING_FIELD.search(what)
    if missing is not None:
        name = f"{path}.{missing['name']}" if path else missing["name"]
        return InvalidRequest(f"{name} is missing; it is required", param=name, code="missing_parameter")
    if not path:
        return InvalidRequest(f"the body must be a JSON object: {_plain(what)}", code="invalid_type")
    return InvalidRequest(f"{path}: {_plain(what)}", param=path, code="invalid_type")


def _plain(what: str) -> str:
    return what.replace("`", "").replace("Expected", "expected", 1)
