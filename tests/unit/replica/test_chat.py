"""Chat templates: rendered as models expect, and harmless whatever they contain."""

from __future__ import annotations

import signal
import time
from typing import Any

import pytest

from headrace.api.openai import ChatMessage
from headrace.engine.model_files.metadata import read_metadata
from headrace.engine.model_files.resolve import resolve_model
from headrace.errors import InvalidRequest, ModelError
from headrace.replica.chat import MAX_MESSAGES, ChatTemplate, flatten_messages

HELLO = [{"role": "user", "content": "hello"}]


def render(source: str, messages: list[dict[str, str]] = HELLO) -> str:
    return ChatTemplate(source, "<s>", "</s>").render(messages)


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{{ bos_token }}{{ messages[0].content }}{{ eos_token }}", "<s>hello</s>"),
        ("{% if add_generation_prompt %}go{% endif %}", "go"),
        ("{% for m in messages %}\n    {{ m['role'] }}\n{% endfor %}", "    user\n"),
        ("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
        ("{{ {'a': '<é>'} | tojson }}", '{"a": "<é>"}'),
        ("{{ messages[0].missing is defined }}{{ tools is none }}", "FalseTrue"),
        ("{{ messages[0]['content'] | upper | trim }}", "HELLO"),
        ("{{ strftime_now('%Y') | length }}", "4"),
        ("{{ '<&>' }}", "<&>"),
    ],
)
def test_templates_have_what_models_use(source: str, text: str) -> None:
    assert render(source) == text


def test_a_template_may_refuse_messages_in_its_own_words() -> None:
    with pytest.raises(InvalidRequest, match="roles must alternate") as caught:
        render("{{ raise_exception('roles must alternate') }}")
    assert caught.value.param == "messages"


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__init__.__globals__ }}",
        "{{ messages.append(1) }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{{ 1 / 0 }}",
        "{{ messages[99].content.x }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% include 'x' %}",
        "{{ 'x' * 100000000 }}",
        "{{ 'x' * 'y' }}",
        "{{ 10 ** 100000 }}",
        "{% for i in range(10000000) %}{% endfor %}",
        "{% for i in range(99999) %}{{ 'x' * 1000 }}{% endfor %}",
    ],
)
def test_what_a_template_must_not_do_is_an_error_of_the_request(source: str) -> None:
    with pytest.raises(InvalidRequest, match="chat template"):
        render(source)


@pytest.mark.slow
@pytest.mark.parametrize(
    "source",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    ],
)
def test_a_template_that_runs_away_is_stopped_and_leaves_nothing_behind(source: str) -> None:
    before = signal.getsignal(signal.SIGVTALRM)
    began_s = time.process_time()
    with pytest.raises(InvalidRequest, match="did not come to an end"):
        render(source)
    assert time.process_time() - began_s < 3
    assert signal.getsignal(signal.SIGVTALRM) is before
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0.0, 0.0)


@pytest.mark.slow
def test_smollm2_chats_as_transformers_renders_it() -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    metadata = read_metadata(resolve_model("smollm2-135m-instruct"))
    assert metadata.chat_template is not None
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": "What is 2+2?"},
    ]
    theirs, _ = render_jinja_template(
        [messages], chat_template=metadata.chat_template, add_generation_prompt=True
    )
    assert render(metadata.chat_template, messages) == theirs[0]


def test_what_is_not_a_template_is_a_model_error() -> None:
    with pytest.raises(ModelError, match="chat template"):
        ChatTemplate("{% for %}")


def message(role: str, content: Any, **more: Any) -> ChatMessage:
    return ChatMessage(role, content, **more)


def test_text_parts_are_joined_and_developer_is_system() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    flat = flatten_messages([message("developer", "be kind"), message("user", parts, name="Ann")])
    assert flat == [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "ab", "name": "Ann"},
    ]


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([], "messages"),
        ([message("user", "x")] * (MAX_MESSAGES + 1), "messages"),
        ([message("user", "x"), message("robot", "x")], "messages[1].role"),
        ([message("tool", "x")], "messages[0]"),
        ([message("assistant", None, tool_calls=[{}])], "messages[0]"),
        ([message("user", None)], "messages[0].content"),
        ([message("user", [{"type": "image_url"}])], "messages[0].content"),
        ([message("user", [{"type": "text"}])], "messages[0].content"),
        ([message("user", [{}])], "messages[0].content"),
    ],
)
def test_what_cannot_be_said_is_refused(messages: list[ChatMessage], param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        flatten_messages(messages)
    assert caught.value.param == param
