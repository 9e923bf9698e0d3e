"""A real front with SmolLM2: answers match what was asked for, whichever words asked for it."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any, Literal

import httpx
import openai
import pytest
from pydantic import BaseModel, ConfigDict, Field
from tests.integration.front_process import RunningFront, check_conservation, running_front

from headrace.api.messages import EngineSpec

pytestmark = pytest.mark.slow
ENGINE = EngineSpec(
    "native",
    "smollm2-135m-instruct",
    max_running=16,
    kv_cache_bytes=64 << 20,
    max_context_tokens=512,
    num_threads=1,
    dtype="int8",  # the arithmetic in which a cached prompt gives the same bits as one that is computed
)
GUIDE = Path(__file__).parents[2] / "docs" / "guides" / "structured-output.md"
SAY = [{"role": "user", "content": "Describe a small red house with one room."}]


class Colour(Enum):
    RED = "red"
    BLUE = "blue"


class Room(BaseModel):
    model_config = ConfigDict(extra="forbid")
    colour: Colour
    windows: int = Field(ge=0, le=20)


class House(BaseModel):
    model_config = ConfigDict(extra="forbid")
    name: str = Field(max_length=8)
    rooms: list[Room] = Field(max_length=1)
    kind: Literal["small", "large"]
    is_old: bool | None


SCHEMA = House.model_json_schema()


@pytest.fixture(scope="module")
def front() -> Iterator[RunningFront]:
    with running_front(ENGINE) as front:
        front.wait_ready()
        yield front
        check_conservation(front)


def post(front: RunningFront, path: str = "chat/completions", **fields: Any) -> httpx.Response:
    body = {"model": "chat", "temperature": 0, "max_tokens": 80, **fields}
    body |= {"prompt": "A house:"} if path == "completions" else {"messages": SAY}
    return httpx.post(f"{front.url}/v1/{path}", json=body, timeout=60, verify=False)


def choices_of(response: httpx.Response) -> list[tuple[str, str]]:
    assert response.status_code == 200, response.text
    return [
        (choice["message"]["content"] if "message" in choice else choice["text"], choice["finish_reason"])
        for choice in response.json()["choices"]
    ]


def json_schema(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "house", "schema": schema, "strict": True}}


@pytest.mark.parametrize("path", ["chat/completions", "completions"])
def test_each_form_is_kept_in_chat_and_completions(front: RunningFront, path: str) -> None:
    ((text, reason),) = choices_of(post(front, path, response_format=json_schema(SCHEMA)))
    assert reason == "stop"
    House.model_validate_json(text)
    ((text, _),) = choices_of(post(front, path, structured_outputs={"regex": r"[A-Z][a-z]{2,5}, \d{4}"}))
    assert re.fullmatch(r"[A-Z][a-z]{2,5}, \d{4}", text)
    ((text, reason),) = choices_of(post(front, path, guided_choice=["a house", "a hut"]))
    assert (text in ("a house", "a hut"), reason) == (True, "stop")
    grammar = 'root ::= "a " ("red" | "blue") " house"'
    ((text, _),) = choices_of(post(front, path, guided_grammar=grammar))
    assert text in ("a red house", "a blue house")


def test_any_json_object_is_one_even_if_it_wanders(front: RunningFront) -> None:
    response = post(
        front, response_format={"type": "json_object"}, n=2, temperature=1.5, seed=4, max_tokens=40
    )
    for text, reason in choices_of(response):
        assert text.startswith("{")
        if reason == "stop":
            assert isinstance(json.loads(text), dict)
        else:
            assert reason == "length"


def test_an_answer_that_is_cut_says_length(front: RunningFront) -> None:
    ((text, reason),) = choices_of(post(front, response_format=json_schema(SCHEMA), max_tokens=6))
    assert reason == "length"
    with pytest.raises(json.JSONDecodeError):
        json.loads(text)


def test_several_choices_each_keep_the_form_and_repeat_by_seed(front: RunningFront) -> None:
    fields: dict[str, Any] = {"response_format": json_schema(SCHEMA), "n": 2, "temperature": 1.3, "seed": 9}
    first, again = (choices_of(post(front, **fields)) for _ in range(2))
    assert first == again
    assert len({text for text, _ in first}) > 1
    for text, reason in first:
        assert reason == "stop"
        House.model_validate_json(text)


def test_a_stream_gives_the_text_of_the_whole_answer(front: RunningFront) -> None:
    fields: dict[str, Any] = {"response_format": json_schema(SCHEMA), "temperature": 1.0, "seed": 5}
    whole = choices_of(post(front, **fields))
    lines = [
        json.loads(line.removeprefix("data: "))
        for line in post(front, stream=True, **fields).text.split("\n\n")
        if line and not line.endswith("[DONE]")
    ]
    deltas = [line["choices"][0]["delta"].get("content") or "" for line in lines]
    assert ("".join(deltas), lines[-1]["choices"][0]["finish_reason"]) == whole[0]


def test_a_stop_string_ends_an_answer_before_its_form_is_complete(front: RunningFront) -> None:
    ((text, reason),) = choices_of(post(front, guided_regex="(one|two), (three|four)", stop=", "))
    assert (text in ("one", "two"), reason) == (True, "stop")


def test_logprobs_show_what_the_form_allowed(front: RunningFront) -> None:
    response = post(front, guided_choice=["yes", "no"], logprobs=True, top_logprobs=5)
    first = response.json()["choices"][0]["logprobs"]["content"][0]
    assert {entry["token"] for entry in first["top_logprobs"]} <= {"yes", "no", "y", "n", "ye"}


async def test_answers_with_and_without_a_form_run_side_by_side(front: RunningFront) -> None:
    forms: list[dict[str, Any]] = [
        {"response_format": json_schema(SCHEMA)},
        {"guided_regex": "[a-f0-9]{8}"},
        {"guided_choice": ["left", "right"]},
        {},
        {"response_format": {"type": "text"}},
    ]
    bodies = [
        {"model": "chat", "messages": SAY, "seed": i, "max_tokens": 100, **forms[i % len(forms)]}
        for i in range(10)
    ]
    async with httpx.AsyncClient(verify=False, timeout=60) as client:
        responses = await asyncio.gather(
            *(client.post(f"{front.url}/v1/chat/completions", json=body) for body in bodies)
        )
    for i, response in enumerate(responses):
        ((text, reason),) = choices_of(response)
        form = i % len(forms)
        if form == 0:
            assert reason == "stop"
            House.model_validate_json(text)
        elif form == 1:
            assert re.fullmatch("[a-f0-9]{8}", text)
        elif form == 2:
            assert text in ("left", "right")


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "missing"),
        ({"guided_regex": "(a"}, "guided_regex", "unclosed group"),
        ({"guided_grammar": "start: x"}, "guided_grammar", "unknown name"),
        ({"guided_json": {"minimum": 3, "maximum": 2, "type": "integer"}}, "guided_json", "greater than"),
        ({"guided_json": {"not": {}}}, "guided_json", "keywords that are not supported: not"),
        ({"guided_json": {"a" * 3: 1}}, "guided_json", "aaa"),
        ({"guided_json": {}, "guided_regex": "a"}, "guided_regex", "send one of them"),
        ({"guided_regex": "(((((a?){100}){100}){100}){100}){100}"}, "guided_regex", "too many"),
    ],
)
def test_a_form_that_cannot_work_is_refused_and_harms_nothing(
    front: RunningFront, fields: dict[str, Any], param: str, words: str
) -> None:
    response = post(front, **fields)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, param), error
    assert words in error["message"]
    assert error["type"] == "invalid_request_error"
    assert choices_of(post(front, guided_choice=["yes"])) == [("yes", "stop")]


def test_the_official_clients_parse_returns_the_pydantic_model(front: RunningFront) -> None:
    class Answer(BaseModel):
        room: Room
        is_small: bool

    with openai.OpenAI(base_url=f"{front.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        answer = client.beta.chat.completions.parse(
            model="chat", messages=SAY, response_format=Answer, temperature=0, max_tokens=200
        )
        assert isinstance(answer.choices[0].message.parsed, Answer), answer
        assert answer.choices[0].finish_reason == "stop"
        with client.chat.completions.stream(
            model="chat", messages=SAY, response_format=Answer, temperature=0, max_tokens=200
        ) as stream:
            final = stream.get_final_completion()
        assert final.choices[0].message.parsed == answer.choices[0].message.parsed


def test_the_official_client_says_when_a_parsed_answer_was_cut(front: RunningFront) -> None:
    with (
        openai.OpenAI(base_url=f"{front.url}/v1", api_key="none", max_retries=0, timeout=60) as client,
        pytest.raises(openai.LengthFinishReasonError),
    ):
        client.chat.completions.parse(
            model="chat", messages=SAY, response_format=House, temperature=0, max_tokens=5
        )


def test_every_snippet_of_the_guide_runs_and_gives_what_it_promises(front: RunningFront) -> None:
    text = GUIDE.read_text().replace("http://127.0.0.1:8000", front.url)
    printed = []
    for language, code in re.findall(r"```(python|bash)\n(.*?)```", text, flags=re.DOTALL):
        command = [sys.executable, "-c", code] if language == "python" else ["bash", "-c", code]
        result = subprocess.run(command, capture_output=True, text=True, timeout=100)
        assert result.returncode == 0, result.stderr
        printed.append(result.stdout)
    house, answer, forms = printed
    assert re.fullmatch(r".* (red|blue) -?\d+\n", house), house
    assert isinstance(json.loads(json.loads(answer)["choices"][0]["message"]["content"])["is_true"], bool)
    choice, date, cities = forms.splitlines()
    assert choice in ("yes", "no")
    assert re.fullmatch(r"\d{4}-\d{2}-\d{2}", date)
    assert re.fullmatch(r"[A-Z][a-z]{2,9}(, [A-Z][a-z]{2,9}){2}", cities)
