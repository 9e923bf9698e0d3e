"""Streams of a real model that outlive their engine: the same bytes, whatever was asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from tests.integration.disturbed_answer import Answer, kill_engine, last_line, wait_new_engine
from tests.integration.front_process import check_conservation
from tests.integration.sibling_fronts import Fronts, sibling_fronts

from headrace.api.messages import EngineSpec

pytestmark = pytest.mark.slow
NUM_TOKENS = 24
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "rooms": {"type": "array", "items": {"type": "integer"}, "minItems": 3, "maxItems": 6},
    },
    "required": ["name", "rooms"],
    "additionalProperties": False,
}
CASES: dict[str, dict[str, Any]] = {
    "seeded": {"seed": 7, "temperature": 1.1, "top_p": 0.9, "n": 2},
    "penalties": {"seed": 3, "presence_penalty": 0.7, "frequency_penalty": 0.4},
    "logprobs": {"temperature": 0, "logprobs": 3, "stream_options": {"include_usage": True}},
    "stop": {"temperature": 0, "stop": [" the", "no such text"], "min_tokens": 12},
    "grammar": {
        "temperature": 0.8,
        "seed": 5,
        "response_format": {"type": "json_schema", "json_schema": {"name": "h", "schema": SCHEMA}},
    },
    "whole": {"seed": 8, "stream": False, "n": 2, "logprobs": 1},
}


@pytest.fixture(scope="module")
def fronts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fronts]:
    engine = EngineSpec(
        "native",
        "smollm2-135m-instruct",
        max_running=12,
        kv_cache_bytes=32 << 20,
        max_context_tokens=512,
        num_threads=1,
        dtype="int8",  # the arithmetic that promises the same bits in any batch
        packed_dir=str(tmp_path_factory.mktemp("packed")),
    )
    with sibling_fronts([engine] * 2) as fronts:
        fronts.wait_ready()
        yield fronts


def ask_all(
    fronts: Fronts, prefix: str, at: int = 0, disturb: Callable[[], object] | None = None
) -> dict[str, str]:
    """Ask all cases at once, and one request more, which calls `disturb` at its token `at`."""
    prompt = "Once there was a small house by the river, and in it"
    answers = {
        name: Answer(fronts[0], f"{prefix}-{name}", **{"prompt": prompt, "max_tokens": NUM_TOKENS, **fields})
        for name, fields in CASES.items()
    }
    last: dict[str, Any] = {"prompt": prompt, "max_tokens": NUM_TOKENS, "temperature": 0}
    answers["greedy"] = Answer(fronts[0], f"{prefix}-greedy", at, disturb, **last)
    return {name: answer.text() for name, answer in answers.items()}


def test_a_killed_engines_answers_are_those_of_an_undisturbed_run(fronts: Fronts) -> None:
    """On a sibling, and on the restarted engine."""
    whole = ask_all(fronts, "sweep")
    for num_restarts, at in enumerate((9, 1)):
        broken = ask_all(fronts, "sweep", at, lambda: kill_engine(fronts, 0))
        for name, text in broken.items():
            assert text == whole[name], f"{name}, killed at token {at}"
        line = last_line(fronts[0], "sweep-greedy", num_restarts + 2)
        assert (line["resumptions"], line["hosts"]) == (1, ["chat-2"])
        wait_new_engine(fronts, 0, num_restarts)
    # One block at least of each that had enough tokens: what the dead engine left was not computed again.
    num_imported = fronts[1].metrics()["engine_imported_tokens_total"]
    assert num_imported >= 16 * len(CASES), num_imported
    fronts.forget_each_other()
    assert ask_all(fronts, "sweep", 5, lambda: kill_engine(fronts, 0)) == whole
    line = last_line(fronts[0], "sweep-greedy", 4)
    assert (line["resumptions"], line["hosts"]) == (1, [])
    ended = check_conservation(fronts[0])
    assert ended["requests_total failed"] == ended["requests_total aborted"] == 0
    metrics = fronts[0].metrics()
    gaps_s, num_gaps = metrics["stream_gap_seconds_sum"], metrics["stream_gap_seconds_count"]
    print(f"{num_gaps:.0f} gaps of {gaps_s / num_gaps * 1000:.0f} ms on average")
