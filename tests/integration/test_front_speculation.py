"""Two real fronts with the native engine and a tiny model, one with speculation: the same answers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from tests.integration.front_process import RunningFront, check_conservation, running_front
from tests.unit.engine.tiny_models import VOCAB_SIZE, huggingface_directory
from tokenizers import Tokenizer, decoders, models

from headrace.api.messages import EngineSpec

pytestmark = pytest.mark.slow
Fronts = dict[str, RunningFront]
PROMPT = [5, 6, 7, 8] * 4


@pytest.fixture(scope="module")
def fronts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fronts]:
    path = tmp_path_factory.mktemp("models") / "tiny"
    huggingface_directory(path)
    write_tokenizer(path / "tokenizer.json")
    # In bfloat16 the number of rows in a step may even change a token.
    plain = EngineSpec("native", str(path), block_size=8, num_threads=1, dtype="float32", max_running=4)
    ngram = msgspec.structs.replace(plain, speculation="ngram")
    with ExitStack() as stack:
        running = {
            name: stack.enter_context(running_front(engine))
            for name, engine in (("plain", plain), ("ngram", ngram))
        }
        for front in running.values():
            front.wait_ready()
        yield running
        for front in running.values():
            check_conservation(front)


def write_tokenizer(path: Path) -> None:
    """Three control tokens, then a printable character each."""
    vocabulary = {name: place for place, name in enumerate(["<unk>", "<s>", "</s>"])}
    vocabulary |= {chr(0x21 + place): 3 + place for place in range(VOCAB_SIZE - 3)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(path))


def complete(front: RunningFront, **fields: Any) -> Any:
    body = {"model": "chat", "prompt": PROMPT, "max_tokens": 48, "ignore_eos": True, "seed": 5}
    few_words = {"40": 8, "41": 8, "42": 8}  # so that they come again
    body |= {"logit_bias": few_words} | fields
    response = httpx.post(f"{front.url}/v1/completions", json=body, timeout=30)
    assert response.status_code == 200, response.text
    if not fields.get("stream"):
        # In float32 the number of rows in a step changes the last digits of a logprob.
        answer = json.loads(response.text, parse_float=lambda digits: round(float(digits), 4))
        return answer["choices"], answer["usage"]["completion_tokens"]
    events = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert events.pop() == "[DONE]"
    return [json.loads(event) for event in events]


CASES: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "sampled, three choices": {"temperature": 0.7, "n": 3},
    "penalties": {"temperature": 0.5, "frequency_penalty": 0.4, "presence_penalty": 0.2},
    "logprobs": {"temperature": 0, "logprobs": 2},
    "an end in the middle of a step": {"temperature": 0, "max_tokens": 23},
}


@pytest.mark.parametrize("case", CASES)
def test_answers_logprobs_and_usage_are_the_same(fronts: Fronts, case: str) -> None:
    answers = {name: complete(front, **CASES[case]) for name, front in fronts.items()}
    assert answers["ngram"] == answers["plain"]


def test_a_stop_string_ends_the_text_and_the_usage_at_the_same_token(fronts: Fronts) -> None:
    (choice,), _ = complete(fronts["plain"], temperature=0, max_tokens=48)
    text = choice["text"]
    stop = text[len(text) // 2 :][:7]
    answers = {name: complete(front, temperature=0, stop=[stop]) for name, front in fronts.items()}
    assert answers["ngram"] == answers["plain"]
    assert answers["ngram"][0][0]["finish_reason"] == "stop"
    assert answers["ngram"][1] < 48


def test_a_stream_gives_the_same_text_in_fewer_pieces_and_the_drafts_are_counted(fronts: Fronts) -> None:
    before = fronts["ngram"].metrics()["spec_decode_num_accepted_tokens_total"]
    texts, sizes = {}, {}
    for name, front in fronts.items():
        events = complete(front, temperature=0, max_tokens=64, stream=True)
        pieces = [choice["text"] for event in events for choice in event["choices"]]
        texts[name], sizes[name] = "".join(pieces), len(pieces)
    assert texts["ngram"] == texts["plain"]
    metrics = fronts["ngram"].metrics()
    num_accepted = metrics["spec_decode_num_accepted_tokens_total"] - before
    assert num_accepted > 0, "the tiny model repeats itself, and nothing was guessed"
    assert sizes["ngram"] < sizes["plain"]
    assert metrics["spec_decode_num_draft_tokens_total"] >= num_accepted
    assert fronts["plain"].metrics()["spec_decode_num_draft_tokens_total"] == 0
