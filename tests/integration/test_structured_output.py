"""A real front with SmolLM2: answers match what was asked for, whichever words asked."""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum
from typing import Any

import httpx
import openai
import pytest
from pydantic import BaseModel
from tests.integration.front_process import RunningFront, check_conservation, running_front

from headrace.api.messages import EngineSpec

pytestmark = pytest.mark.slow
ENGINE = EngineSpec(
    "native",
    "smollm2-135m-instruct",
    max_running=8,
    kv_cache_bytes=64 << 20,
    max_context_tokens=512,
    num_threads=1,
)
SAY = [{"role": "user", "content": "Describe a small red house."}]


@pytest.fixture(scope="module")
def front() -> Iterator[RunningFront]:
    with running_front(ENGINE) as front:
        front.wait_ready()
        yield front
        check_conservation(front)


def chat(front: RunningFront, **fields: Any) -> httpx.Response:
    body = {"model": "chat", "messages": SAY, "temperature": 0, "max_tokens": 48, **fields}
    return httpx.post(f"{front.url}/v1/chat/completions", json=body, timeout=60, verify=False)


def text_of(response: httpx.Response) -> tuple[str, str]:
    assert response.status_code == 200, response.text
    choice = response.json()["choices"][0]
    return choice["message"]["content"], choice["finish_reason"]


class Colour(Enum):
    RED = "red"
    BLUE = "blue"


class Room(BaseModel):
    colour: Colour
    windows: int


class House(BaseModel):
    rooms: list[Room]
    is_small: bool


def test_the_official_clients_parse_returns_the_pydantic_model(front: RunningFront) -> None:
    class Answer(BaseModel):
        colour: Colour
        room: Room
        is_small: bool

    with openai.OpenAI(base_url=f"{front.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        answer = client.beta.chat.completions.parse(
            model="chat", messages=SAY, response_format=Answer, temperature=0, max_tokens=200
        )
    parsed = answer.choices[0].message.parsed
    assert isinstance(parsed, Answer), answer
    assert answer.choices[0].finish_reason == "stop"
