"""A front with a real vLLM engine serves, survives the death of its engine core, and leaves nothing behind.

One start for all tests, in their order; the last ones kill and stop it.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import psutil
import pytest
from tests.integration.front_process import RunningFront, check_conservation, running_front
from tests.slow.vllm_rig import START_LIMIT_S, is_gone, processes_below, spec_of, wait_until, write_model

pytest.importorskip("vllm", reason="needs the environment of `make test-slow`, which holds vLLM")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
LONG = "Once upon a time " * 60
"""More tokens than one of vLLM's KV blocks on CPUs (128)."""


@pytest.fixture(scope="module")
def front(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningFront]:
    model = write_model(tmp_path_factory.mktemp("models") / "smollm2")
    with running_front(spec_of(model), resume_limit_s=START_LIMIT_S) as running:
        running.router.wait_for(lambda report: report.state == "ready", START_LIMIT_S)
        yield running


def complete(front: RunningFront, prompt: str = "The capital of France is", **fields: Any) -> dict[str, Any]:
    body = {"model": "chat", "prompt": prompt, "max_tokens": 8, "temperature": 0, **fields}
    answer = httpx.post(f"{front.url}/v1/completions", json=body, timeout=120)
    assert answer.status_code == 200, answer.text
    tree: dict[str, Any] = answer.json()
    return tree


def text_of(answer: dict[str, Any]) -> str:
    return str(answer["choices"][0]["text"])


def stream(front: RunningFront, **fields: Any) -> tuple[str, int]:
    """Return the text of a stream, and its number of chunks with text."""
    body = {"model": "chat", "prompt": "Count: 1 2 3", "temperature": 0, "stream": True, **fields}
    texts = []
    with httpx.stream("POST", f"{front.url}/v1/completions", json=body, timeout=START_LIMIT_S) as answer:
        lines = [line for line in answer.iter_lines() if line.startswith("data: ")]
    assert lines[-1] == "data: [DONE]"
    for line in lines[:-1]:
        event = json.loads(line.removeprefix("data: "))
        assert "error" not in event, event
        texts += [choice["text"] for choice in event["choices"] if choice["text"]]
    return "".join(texts), len(texts)


def test_it_answers_and_says_what_it_is(front: RunningFront) -> None:
    assert "Paris" in text_of(complete(front))
    load = front.router.latest.engine
    assert load is not None
    assert load.num_total_blocks > 0
    assert load.busy_ns > 0


def test_chat_goes_through_the_models_template(front: RunningFront) -> None:
    body = {"model": "chat", "messages": [{"role": "user", "content": "Say hi."}], "max_tokens": 5}
    answer = httpx.post(f"{front.url}/v1/chat/completions", json=body, timeout=60).json()
    assert answer["choices"][0]["finish_reason"] in ("stop", "length")
    assert answer["usage"]["prompt_tokens"] > 5


def test_a_stream_has_an_event_per_token_and_the_same_text(front: RunningFront) -> None:
    text, num_chunks = stream(front, max_tokens=20, ignore_eos=True)
    assert text == text_of(complete(front, "Count: 1 2 3", max_tokens=20, ignore_eos=True))
    assert num_chunks > 15


def test_a_prompt_that_came_before_is_cached(front: RunningFront) -> None:
    complete(front, LONG)
    usage = complete(front, LONG)["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] >= 128


def test_routers_hear_what_is_cached_and_what_was_evicted(front: RunningFront) -> None:
    """Twice as many tokens as the cache holds, in prompts that differ from their beginning."""
    info = front.router.latest.engine_info
    assert info is not None
    for number in range(2 * info.num_total_blocks * info.block_size // 800):
        complete(front, f"{number} " + "one two three four " * 200, max_tokens=1)
    reports = front.router.reports
    added = {prefix for report in reports for prefix in report.prefixes_added}
    removed = {prefix for report in reports for prefix in report.prefixes_removed}
    assert removed
    assert removed < added


def test_the_same_seed_gives_the_same_answer_and_another_another(front: RunningFront) -> None:
    first, again, other = (
        text_of(complete(front, temperature=1.2, seed=seed, max_tokens=24, ignore_eos=True))
        for seed in (1, 1, 2)
    )
    assert first == again != other


def test_logprobs_are_of_the_tokens_in_the_answer(front: RunningFront) -> None:
    logprobs = complete(front, logprobs=2, max_tokens=3, ignore_eos=True)["choices"][0]["logprobs"]
    assert len(logprobs["token_logprobs"]) == len(logprobs["tokens"]) == 3
    for sampled, top in zip(logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True):
        assert max(top.values()) == sampled <= 0, "greedy takes the most likely token"


def test_bias_stop_tokens_and_lengths_are_obeyed(front: RunningFront) -> None:
    biased = complete(front, logit_bias={"28": 100}, max_tokens=4, logprobs=0, ignore_eos=True)
    (token,) = set(biased["choices"][0]["logprobs"]["tokens"])
    stopped = complete(front, logit_bias={"28": 100}, stop_token_ids=[28], min_tokens=3)
    assert stopped["choices"][0]["finish_reason"] == "stop"
    assert not text_of(stopped).endswith(token), "the token that stopped it is no part of it"
    assert stopped["usage"]["completion_tokens"] >= 3
    assert biased["choices"][0]["finish_reason"] == "length"


def test_an_answer_matches_its_schema(front: RunningFront) -> None:
    schema = {"type": "object", "properties": {"a::=b": {"type": "integer"}}, "required": ["a::=b"]}
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": {**schema}}}
    body = {"messages": [{"role": "user", "content": "A number, as JSON."}], "response_format": form}
    answer = httpx.post(
        f"{front.url}/v1/chat/completions",
        json={"model": "chat", "temperature": 0, "max_tokens": 60, **body},
        timeout=120,
    )
    assert answer.status_code == 200, answer.text
    value = json.loads(answer.json()["choices"][0]["message"]["content"])
    assert isinstance(value["a::=b"], int)


def test_a_wrong_request_is_refused_and_the_next_one_is_not(front: RunningFront) -> None:
    body = {"model": "chat", "prompt": "word " * 2000, "max_tokens": 8}
    answer = httpx.post(f"{front.url}/v1/completions", json=body, timeout=60)
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "context_length_exceeded"
    complete(front)


def test_many_at_once_all_end_and_their_work_is_measured(front: RunningFront) -> None:
    answers: list[dict[str, Any]] = []

    def ask(number: int) -> None:
        answers.append(complete(front, f"Number {number}:", max_tokens=16, ignore_eos=True))

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [answer["usage"]["completion_tokens"] for answer in answers] == [16] * 12
    check_conservation(front)
    load = front.router.wait_for(
        lambda report: report.engine is not None and not report.engine.num_running
    ).engine
    assert load is not None
    assert load.num_waiting == load.num_uncomputed_tokens == 0
    assert load.step_model is not None
    assert load.num_free_blocks == load.num_total_blocks


def test_a_client_that_leaves_frees_its_place(front: RunningFront) -> None:
    body = {"model": "chat", "prompt": "On", "max_tokens": 900, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{front.url}/v1/completions", json=body, timeout=60) as answer:
        next(answer.iter_lines())
    front.router.wait_for(lambda report: report.engine is not None and report.engine.num_running == 0)
    assert check_conservation(front)["requests_total aborted"] >= 1


def test_an_answer_goes_on_after_the_engine_core_was_killed(front: RunningFront) -> None:
    """The front starts another engine, and the stream continues there: greedy, the same text."""
    undisturbed, _ = stream(front, max_tokens=200, ignore_eos=True)
    leader = psutil.Process(front.router.latest.engine_pid)
    old = [leader, *processes_below(leader.pid)]
    (core,) = [process for process in old if "EngineCore" in process.name() + " ".join(process.cmdline())]
    found: list[str] = []
    thread = threading.Thread(target=lambda: found.append(stream(front, max_tokens=200, ignore_eos=True)[0]))
    thread.start()
    front.router.wait_for(lambda report: report.engine is not None and report.engine.num_running == 1)
    core.kill()
    thread.join(START_LIMIT_S)
    assert found == [undisturbed]
    wait_until(lambda: all(map(is_gone, old)), 20.0, "the old engine's processes are gone")


def test_stopping_drains_and_leaves_nothing_behind(front: RunningFront) -> None:
    left = processes_below(front.process.pid)  # of the front's own, too
    assert len(left) >= 2
    found: list[str] = []
    thread = threading.Thread(target=lambda: found.append(stream(front, max_tokens=60, ignore_eos=True)[0]))
    thread.start()
    front.router.wait_for(lambda report: report.engine is not None and report.engine.num_running == 1)
    assert front.stop(60.0) == 0
    thread.join(10)
    assert len(found) == 1, "an open answer was finished first"
    wait_until(lambda: all(map(is_gone, left)), 20.0, "nothing is left")
