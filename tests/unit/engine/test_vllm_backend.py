"""vLLM's words and ours, without vLLM: its messages are stood for by plain objects with the same fields.

tests/slow holds the real one to them.
"""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from headrace.api.messages import GenerationRequest, SamplingParams
from headrace.engine.adapter import BackendOutput
from headrace.engine.vllm_backend import (
    _lark_of,
    _model_directory,
    _prompt,
    checked_arguments,
    read_step,
    sampling_arguments,
)
from headrace.errors import ConfigError, InvalidRequest


class Reason:
    """Like vLLM's FinishReason: its text is the word."""

    def __init__(self, word: str) -> None:
        self.word = word

    def __str__(self) -> str:
        return self.word


def output(token_ids: list[int], **fields: Any) -> SimpleNamespace:
    empty = {"new_logprobs": None, "finish_reason": None, "events": None, "prefill_stats": None}
    return SimpleNamespace(request_id="r", new_token_ids=token_ids, **(empty | fields))


def message(*outputs: SimpleNamespace, stats: SimpleNamespace | None = None) -> SimpleNamespace:
    return SimpleNamespace(outputs=list(outputs), scheduler_stats=stats)


def test_the_token_that_ended_an_answer_is_left_out_and_others_are_not() -> None:
    cases = {"stop": [5], "length": [5, 6], "abort": [5, 6], "error": [5, 6], "repetition": [5, 6]}
    for word, expected in cases.items():
        (read,) = read_step(message(output([5, 6], finish_reason=Reason(word)))).outputs
        assert read.token_ids == expected, word
    words = [read_step(message(output([1], finish_reason=Reason(word)))) for word in cases]
    reasons = [step.outputs[0].finish_reason for step in words]
    assert reasons == ["stop", "length", "aborted", "error", "stop"]


def test_logprobs_have_the_sampled_token_first_and_end_with_the_answer() -> None:
    lists = SimpleNamespace(
        logprob_token_ids=np.array([[7, 8, 7], [2, 2, 9]]),
        logprobs=np.array([[-1.5, -0.5, -1.5], [-0.25, -0.25, -3.0]]),
    )
    (read,) = read_step(message(output([7, 2], new_logprobs=lists, finish_reason=Reason("stop")))).outputs
    assert read.logprobs is not None
    assert [(entry.logprob, entry.top) for entry in read.logprobs] == [(-1.5, [(8, -0.5), (7, -1.5)])]


def test_statistics_of_a_step_are_read_with_or_without_details() -> None:
    stats = SimpleNamespace(
        num_running_reqs=3,
        kv_cache_usage=0.5,
        prefix_cache_stats=SimpleNamespace(queries=20, hits=16),
        iteration_details=SimpleNamespace(num_ctx_tokens=12),
        spec_decoding_stats=SimpleNamespace(num_draft_tokens=4, num_accepted_tokens=3),
    )
    preempted = SimpleNamespace(type=SimpleNamespace(name="PREEMPTED"))
    queued = SimpleNamespace(type=SimpleNamespace(name="QUEUED"))
    prefill = SimpleNamespace(num_cached_tokens=16)
    step = read_step(message(output([1], events=[queued, preempted], prefill_stats=prefill), stats=stats))
    assert step.outputs == [BackendOutput("r", [1], num_cached_tokens=16)]
    assert (step.num_running, step.kv_usage_ratio, step.num_prompt_tokens) == (3, 0.5, 12)
    assert (step.prefix_query_tokens, step.prefix_hit_tokens, step.num_preemptions) == (20, 16, 1)
    assert (step.num_draft_tokens, step.num_accepted_tokens) == (4, 3)
    stats.iteration_details = stats.spec_decoding_stats = None
    step = read_step(message(stats=stats))
    assert (step.num_prompt_tokens, step.num_draft_tokens) == (None, 0)


def test_sampling_parameters_are_all_handed_over() -> None:
    ours = SamplingParams(
        max_tokens=9,
        temperature=0.5,
        top_p=0.9,
        top_k=40,
        min_p=0.1,
        presence_penalty=0.2,
        frequency_penalty=0.3,
        repetition_penalty=1.1,
        logit_bias={4: 2.0},
        num_logprobs=3,
        seed=11,
        stop_token_ids=(2, 3),
        ignore_eos=True,
        min_tokens=1,
    )
    theirs = sampling_arguments(ours)
    renamed = {"num_logprobs": "logprobs"}
    for name in ours.__struct_fields__:
        value = getattr(ours, name)
        assert theirs[renamed.get(name, name)] == (list(value) if isinstance(value, tuple) else value), name
    greedy = sampling_arguments(SamplingParams(temperature=0.0, seed=11))
    assert (greedy["seed"], greedy["logprobs"], greedy["logit_bias"]) == (None, None, None)
    assert theirs["detokenize"] is False


def test_the_salt_goes_with_the_prompt() -> None:
    salted = GenerationRequest("r", [1, 2], SamplingParams(), cache_salt="abc", num_shared_tokens=1)
    assert _prompt(salted) == {"type": "token", "prompt_token_ids": [1, 2], "cache_salt": "abc"}
    assert "cache_salt" not in _prompt(GenerationRequest("r", [1], SamplingParams()))


def test_a_grammar_is_handed_over_in_lark_and_never_looks_like_another_notation() -> None:
    def wrapped(lark: str) -> str:
        return json.dumps({"grammars": [{"lark_grammar": lark}]})

    assert _lark_of(wrapped("start: /[0-9]+/")) == "start: /[0-9]+/"
    disguised = _lark_of(wrapped('start: "a ::= b"'))
    assert "::=" not in disguised
    assert json.loads(disguised.removeprefix("start: ")) == "a ::= b", "the same text to a parser"
    for wrong in ("{", "{}", '{"grammars": []}', '{"grammars": [{"json_schema": {}}]}'):
        with pytest.raises(InvalidRequest, match="not one of llguidance's"):
            _lark_of(wrong)


def test_arguments_that_are_not_the_users_are_refused_together_with_why() -> None:
    assert checked_arguments({"max_model_len": 512}) == {"max_model_len": 512}
    with pytest.raises(ConfigError) as caught:
        checked_arguments({"model": "x", "data_parallel_size": 2, "max_model_len": 5})
    assert caught.value.problems == [
        "vllm.args.model cannot be set: it is the endpoint's model",
        "vllm.args.data_parallel_size cannot be set: use replicas",
    ]


def test_only_hugging_face_models_are_given_to_vllm() -> None:
    with pytest.raises(ConfigError, match="gguf model; engine vllm takes a Hugging Face id or a directory"):
        _model_directory("smollm2-135m-instruct")
