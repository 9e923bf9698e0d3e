"""Chat messages to one prompt text, with the model's own template in a sandbox.

Owns the sandbox: templates come with models and are not trusted. A template that fails, runs away or floods
gives the client an error and costs at most `max_cpu_s`. Must not know tokens or HTTP.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import signal
import threading
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Any, NoReturn

import jinja2
import jinja2.sandbox

from headrace.api.openai import ChatMessage
from headrace.errors import InvalidRequest, ModelError

SIMULATED_TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
MAX_MESSAGES = 4096
MAX_PROMPT_CHARACTERS = 16 * 1024 * 1024
MAX_CPU_S = 0.5
_MAX_REPEATED = 1_000_000
_ROLES = ("system", "developer", "user", "assistant")


class _TemplateRaised(Exception):
    """The template itself refused the messages (`raise_exception`)."""


class _TemplateRanAway(Exception):
    """The template used up its time or its space."""


class _Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Also bounds the two operators that make much out of little."""

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        sizes = [len(value) if hasattr(value, "__len__") else abs(value) for value in (left, right)]
        if operator == "**" and (sizes[0] > _MAX_REPEATED or sizes[1] > 64):
            raise _TemplateRanAway("a power is too large")
        if operator == "*" and sizes[0] * sizes[1] > _MAX_REPEATED:
            raise _TemplateRanAway("a product is too large")
        return super().call_binop(context, operator, left, right)


class ChatTemplate:
    """A model's chat template. Raises ModelError if its source is not a template."""

    def __init__(self, source: str, bos_token: str = "", eos_token: str = "") -> None:
        environment = _Sandbox(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"], autoescape=False
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise ModelError(f"the model's chat template cannot be used: {error}") from error
        self._variables = {"bos_token": bos_token, "eos_token": eos_token, "tools": None, "documents": None}

    def render(self, messages: Sequence[dict[str, str]]) -> str:
        """Return the prompt for the assistant's next message. Raises InvalidRequest.

        Runs on the main thread only: its time limit is a signal.
        """
        try:
            with _cpu_limit(MAX_CPU_S):
                return self._collect(messages)
        except _TemplateRaised as error:
            raise InvalidRequest(
                f"the model's chat template refuses these messages: {error}", param="messages"
            ) from None
        except _TemplateRanAway as error:
            raise InvalidRequest(
                f"the model's chat template did not come to an end with these messages ({error}); "
                "send fewer or shorter ones",
                param="messages",
            ) from None
        except Exception as error:  # a template can raise anything, TypeError and RecursionError included
            raise InvalidRequest(
                f"the model's chat template failed with these messages: {type(error).__name__}: {error}",
                param="messages",
            ) from None

    def _collect(self, messages: Sequence[dict[str, str]]) -> str:
        parts: list[str] = []
        num_characters = 0
        for part in self._template.generate(
            messages=list(messages), add_generation_prompt=True, **self._variables
        ):
            num_characters += len(part)
            if num_characters > MAX_PROMPT_CHARACTERS:
                raise _TemplateRanAway(f"more than {MAX_PROMPT_CHARACTERS} characters")
            parts.append(part)
        return "".join(parts)


def flatten_messages(messages: Sequence[ChatMessage]) -> list[dict[str, str]]:
    """Return messages as templates want them: a role and one text each. Raises InvalidRequest."""
    if not messages:
        raise InvalidRequest("messages is empty; send at least one message", param="messages")
    if len(messages) > MAX_MESSAGES:
        raise InvalidRequest(
            f"there are {len(messages)} messages; at most {MAX_MESSAGES} are allowed", param="messages"
        )
    return [_flatten(message, f"messages[{index}]") for index, message in enumerate(messages)]


def _flatten(message: ChatMessage, where: str) -> dict[str, str]:
    if message.role in ("tool", "function") or message.tool_calls or message.function_call:
        raise InvalidRequest(
            f"{where}: tool calls are not supported yet; send messages with the roles {', '.join(_ROLES)}",
            param=where,
            code="unsupported_parameter",
        )
    if message.role not in _ROLES:
        raise InvalidRequest(
            f"{where}.role is {message.role[:40]!r}; it must be one of {', '.join(_ROLES)}",
            param=f"{where}.role",
        )
    # Templates know the older word for it.
    role = "system" if message.role == "developer" else message.role
    flat = {"role": role, "content": _text_of(message.content, f"{where}.content")}
    if message.name is not None:
        flat["name"] = message.name
    return flat


def _text_of(content: str | list[dict[str, Any]] | None, where: str) -> str:
    if isinstance(content, str):
        return content
    if content is None:
        raise InvalidRequest(f"{where} is missing; send a text", param=where)
    texts: list[str] = []
    for index, part in enumerate(content):
        kind, text = part.get("type"), part.get("text")
        if kind != "text":
            raise InvalidRequest(
                f"{where}[{index}].type is {str(kind)[:40]!r}; only 'text' is supported", param=where
            )
        if not isinstance(text, str):
            raise InvalidRequest(f"{where}[{index}].text is missing or not a text", param=where)
        texts.append(text)
    return "".join(texts)


@contextlib.contextmanager
def _cpu_limit(seconds: float) -> Iterator[None]:
    """Raise _TemplateRanAway inside the block once this process has computed for `seconds`.

    A thread could be abandoned but not stopped, and would hold the interpreter lock; a signal stops it.
    """
    assert threading.current_thread() is threading.main_thread(), "signals come to the main thread"

    def on_alarm(_number: int, _frame: FrameType | None) -> NoReturn:
        raise _TemplateRanAway(f"more than {seconds:g} s of computing")

    previous = signal.signal(signal.SIGVTALRM, on_alarm)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, previous)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own tojson escapes for HTML, which prompts are not."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> NoReturn:
    raise _TemplateRaised(str(message))


def _strftime_now(pattern: str) -> str:
    return datetime.datetime.now().astimezone().strftime(pattern)
