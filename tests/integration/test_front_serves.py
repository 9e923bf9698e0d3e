"""A real front process with the simulated engine answers as OpenAI's server would."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from tests.integration.front_process import RunningFront, check_conservation, running_front

from headrace.api.messages import EngineSpec, TerminalState

pytestmark = pytest.mark.slow
CHAT = {"model": "chat", "messages": [{"role": "user", "content": "What is the capital of Italy?"}]}


@pytest.fixture(scope="module")
def front() -> Iterator[RunningFront]:
    engine = EngineSpec("simulated", "simulated", simulated_step_s=0.001, max_context_tokens=2000)
    with running_front(engine) as front:
        front.wait_ready()
        yield front
        check_conservation(front)


def post(front: RunningFront, path: str, body: Any, **headers: str) -> httpx.Response:
    return httpx.post(f"{front.url}{path}", json=body, headers=headers, verify=False)


def client(front: RunningFront) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{front.url}/v1", api_key="none", max_retries=0, timeout=20)


def events(response: httpx.Response) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


async def test_the_official_client_gets_a_whole_answer(front: RunningFront) -> None:
    async with client(front) as api:
        answer = await api.chat.completions.create(
            model="chat", messages=[{"role": "user", "content": "hello"}], max_tokens=20, seed=1
        )
    assert answer.choices[0].message.content.startswith("[simulated] ")
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 20
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 20
    assert answer.usage.prompt_tokens_details.cached_tokens == 0
    assert answer.system_fingerprint == "headrace-simulated"


async def test_the_official_client_streams_the_same_text_as_a_whole_answer(front: RunningFront) -> None:
    arguments: dict[str, Any] = {
        "model": "chat",
        "messages": [{"role": "user", "content": "hello"}],
        "max_completion_tokens": 50,
        "seed": 7,
    }
    async with client(front) as api:
        whole = await api.chat.completions.create(**arguments)
        stream = await api.chat.completions.create(
            **arguments, stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks[-2:-1]] == ["length"]
    assert chunks[-1].usage == whole.usage
    assert all(chunk.usage is None for chunk in chunks[:-1])


async def test_the_official_client_completes_several_prompts(front: RunningFront) -> None:
    async with client(front) as api:
        answer = await api.completions.create(
            model="chat", prompt=["one", "two"], n=2, max_tokens=30, seed=3, logprobs=1
        )
        alone = await api.completions.create(model="chat", prompt="two", max_tokens=30, seed=4)
        ids = await api.completions.create(model="chat", prompt=list(b"two"), max_tokens=30, seed=4)
        models = [model.id async for model in await api.models.list()]
        model = await api.models.retrieve("chat")
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    # The second choice of a prompt is what its seed + 1 gives alone.
    assert answer.choices[3].text == alone.choices[0].text == ids.choices[0].text
    assert answer.usage.prompt_tokens == 6
    assert answer.usage.completion_tokens == 120
    assert "".join(answer.choices[0].logprobs.tokens) == answer.choices[0].text
    assert models == ["chat"]
    assert model.id == "chat"


async def test_an_error_reaches_the_official_client_as_its_own_class(front: RunningFront) -> None:
    async with client(front) as api:
        with pytest.raises(openai.NotFoundError, match="serves 'chat'"):
            await api.chat.completions.create(model="other", messages=[{"role": "user", "content": "x"}])
        with pytest.raises(openai.BadRequestError, match="messages is empty"):
            await api.chat.completions.create(model="chat", messages=[])


def test_frames_of_a_stream_are_openai_chunks(front: RunningFront) -> None:
    response = post(front, "/v1/chat/completions", {**CHAT, "max_tokens": 3, "stream": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    chunks = events(response)
    assert [chunk["object"] for chunk in chunks] == ["chat.completion.chunk"] * 5
    assert chunks[0]["choices"] == [
        {
            "index": 0,
            "delta": {"role": "assistant", "content": ""},
            "logprobs": None,
            "finish_reason": None,
        }
    ]
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == "[si"
    assert chunks[-1]["choices"][0] == {
        "index": 0,
        "delta": {},
        "logprobs": None,
        "finish_reason": "length",
    }
    assert "usage" not in chunks[0]


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_stop_string_across_tokens_ends_the_answer_before_it(front: RunningFront, is_stream: bool) -> None:
    body = {"model": "chat", "prompt": "x", "max_tokens": 500, "stop": ["lated]", "zzz"], "stream": is_stream}
    response = post(front, "/v1/completions", body)
    choices = [chunk["choices"][0] for chunk in (events(response) if is_stream else [response.json()])]
    assert "".join(choice["text"] for choice in choices) == "[simu"
    assert choices[-1]["finish_reason"] == "stop"


def test_logprobs_of_a_stream_match_its_text(front: RunningFront) -> None:
    body = {**CHAT, "max_tokens": 6, "stream": True, "logprobs": True, "top_logprobs": 1}
    chunks = events(post(front, "/v1/chat/completions", body))
    entries = [e for c in chunks for e in (c["choices"][0]["logprobs"] or {"content": []})["content"]]
    assert "".join(entry["token"] for entry in entries) == "[simul"
    assert entries[0] == {
        "token": "[",
        "logprob": 0.0,
        "bytes": [91],
        "top_logprobs": [{"token": "[", "logprob": 0.0, "bytes": [91]}],
    }


def test_without_max_tokens_the_rest_of_the_context_may_be_used(front: RunningFront) -> None:
    body = {"model": "chat", "prompt": list(range(100)) * 19, "ignore_eos": True}
    assert post(front, "/v1/completions", body).json()["usage"]["completion_tokens"] == 100


def test_request_ids_are_echoed_and_reported(front: RunningFront) -> None:
    body = {**CHAT, "max_tokens": 2}
    ids = {"x-headrace-request-id": "internal-1", "x-request-id": "mine"}
    response = post(front, "/v1/chat/completions", body, **ids)
    assert response.headers["x-request-id"] == "mine"
    assert response.headers["x-headrace-replica"] == "chat-1"
    assert response.headers["x-headrace-engine"] == "simulated"
    finished = front.router.wait_finished("internal-1")
    assert finished.state is TerminalState.FINISHED
    assert (finished.finish_reason, finished.num_output_tokens) == ("length", 2)
    assert 0 < finished.ttft_s <= finished.total_s
    only_internal = post(front, "/v1/chat/completions", body, **{"x-headrace-request-id": "internal-2"})
    assert only_internal.headers["x-request-id"] == "internal-2"
    assert post(front, "/v1/chat/completions", body).headers["x-request-id"]


def test_a_refusal_is_reported_too(front: RunningFront) -> None:
    post(front, "/v1/chat/completions", {"model": "chat"}, **{"x-headrace-request-id": "refused-1"})
    assert front.router.wait_finished("refused-1").state is TerminalState.REFUSED


def test_the_log_has_one_line_per_request_and_no_prompt(front: RunningFront) -> None:
    body = {**CHAT, "messages": [{"role": "user", "content": "a secret thing"}], "max_tokens": 2}
    post(front, "/v1/chat/completions", body, **{"x-headrace-request-id": "logged-1"})
    front.router.wait_finished("logged-1")
    lines: list[dict[str, Any]] = []
    deadline_s = time.monotonic() + 5
    while not lines and time.monotonic() < deadline_s:
        lines = [line for line in front.access_log() if line["request_id"] == "logged-1"]
    assert [(line["status"], line["state"], line["output_tokens"]) for line in lines] == [
        (200, "finished", 2)
    ]
    assert "secret" not in front.log()


def test_tokenize_and_detokenize_are_inverse(front: RunningFront) -> None:
    text = "héllo 😀"
    tokens = post(front, "/tokenize", {"prompt": text}).json()
    assert tokens["count"] == len(text.encode())
    assert post(front, "/detokenize", {"tokens": tokens["tokens"]}).json() == {"prompt": text}
    chat = post(front, "/tokenize", {"messages": CHAT["messages"]}).json()
    assert chat["count"] > 20


def test_small_answers_say_who_and_how_the_replica_is(front: RunningFront) -> None:
    assert httpx.get(f"{front.url}/health", verify=False).json() == {"status": "ok"}
    assert httpx.get(f"{front.url}/ready", verify=False).json() == {"status": "ready", "reason": ""}
    assert httpx.get(f"{front.url}/version", verify=False).json()["version"]
    assert httpx.head(f"{front.url}/health", verify=False).content == b""
    assert httpx.options(f"{front.url}/v1/models", verify=False).headers["allow"] == "GET, HEAD, OPTIONS"
    card = httpx.get(f"{front.url}/v1/models/chat", verify=False).json()
    assert (card["id"], card["max_model_len"]) == ("chat", 2000)
