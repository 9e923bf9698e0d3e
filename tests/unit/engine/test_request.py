"""Which requests an engine refuses, and what its error says."""

from __future__ import annotations

import math
from typing import Any

import pytest

from headrace.api.messages import GenerationRequest, SamplingParams
from headrace.engine.request import EngineRequest, check_request
from headrace.errors import InvalidRequest


def check(prompt: list[int] | None = None, **fields: Any) -> None:
    check_request(GenerationRequest("r", [1, 2] if prompt is None else prompt, **fields), 100, 32)


def make(**sampling: Any) -> dict[str, Any]:
    return {"sampling": SamplingParams(**sampling)}


def test_defaults_are_accepted() -> None:
    check(**make())


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"prompt": []}, "no tokens"),
        ({"prompt": [1, 100]}, "prompt has token id 100; ids are 0 to 99"),
        ({"prompt": [-1]}, "token id -1"),
        ({"prompt": [1] * 32}, "32 tokens and the context holds 32"),
        ({"prompt": [1] * 30, "resume_from": [1, 1]}, "32 tokens and the context holds 32"),
        ({"resume_from": [1] * 16}, "resume_from has 16 tokens and max_tokens is 16"),
        ({"lora": "fox"}, "LoRA 'fox'"),
        ({"grammar": "root ::= x"}, "grammar"),
        (make(max_tokens=0), "max_tokens is 0; it must be >= 1"),
        (make(min_tokens=-1), "min_tokens is -1"),
        (make(temperature=-0.1), "temperature is -0.1"),
        (make(temperature=math.nan), "temperature is nan"),
        (make(temperature=math.inf), "temperature is inf"),
        (make(top_p=0.0), "top_p is 0.0; it must be > 0 and <= 1"),
        (make(top_p=1.1), "top_p is 1.1"),
        (make(top_k=-1), "top_k is -1"),
        (make(min_p=2.0), "min_p is 2.0"),
        (make(presence_penalty=math.nan), "presence_penalty is nan"),
        (make(frequency_penalty=math.inf), "frequency_penalty is inf"),
        (make(repetition_penalty=0.0), "repetition_penalty is 0.0"),
        (make(num_logprobs=65), "num_logprobs is 65"),
        (make(logit_bias={100: 1.0}), "logit_bias has token id 100"),
        (make(logit_bias={1: math.nan}), "logit_bias of token 1 is nan"),
        (make(stop_token_ids=(100,)), "stop_token_ids has token id 100"),
    ],
)
def test_a_request_that_can_never_run_is_refused_with_what_was_got_and_what_is_allowed(
    fields: dict[str, Any], words: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        check(**{"sampling": SamplingParams(), **fields})
    assert words in caught.value.message


def test_a_request_ends_at_its_stop_tokens_at_max_tokens_and_at_the_end_of_the_context() -> None:
    def request(max_context_tokens: int = 99, **sampling: Any) -> EngineRequest:
        return EngineRequest(
            GenerationRequest("r", [1, 2], SamplingParams(**sampling)), 0, frozenset({9}), max_context_tokens
        )

    assert request().append(9) == "stop"
    assert request(ignore_eos=True).append(9) is None
    assert request(ignore_eos=True, stop_token_ids=(9,)).append(9) == "stop"
    assert request(max_tokens=1).append(5) == "length"
    assert request(max_context_tokens=3).append(5) == "length"
    assert request().append(5) is None
