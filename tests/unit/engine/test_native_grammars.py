"""The native engine holds answers to grammars: every answer is judged by something else than the matcher.

Pydantic judges JSON, `re` patterns. The fake runner's logits are a hash, so the answers wander everywhere
that the grammars let them.
"""

from __future__ import annotations

import json
import re
import threading
import time
from typing import Any, Literal

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, Field
from tests.unit.engine.grammar_rig import EOS, GrammarRig

from headrace.api.messages import GenerationRequest, SamplingParams
from headrace.engine import grammar_queue
from headrace.engine.constraint import Constraint
from headrace.engine.fused_sampling import load_fused_sampling
from headrace.engine.grammar_queue import COMPILE_LIMIT_S, GrammarQueue
from headrace.engine.sampler import Sampler
from headrace.engine.speculation.ngram import NgramProposer
from headrace.engine.speculation.speculator import Speculator
from headrace.errors import InvalidRequest
from headrace.replica.grammar_text import write_grammar

pytestmark = pytest.mark.slow
PATTERNS = (
    r"[a-z]{3}-\d{4}",
    r"(yes|no|maybe)(, (yes|no|maybe)){0,3}",
    r"[^aeiou]{1,12}",
    r"[a-zß-ü.]{1,8}@[a-z]{1,8}\.(com|org)",
    r"(é|ß|😀|日本){1,6}",
    r"(a|ab|abc){0,6}c?",
)
CHOICES = ["red", "redder", "blue", "dark blue", 'with "quotes"', "line\nend", "größer 😀"]
GBNF = """
root ::= "SELECT " column (", " column){0,2} " FROM " table
column ::= "name" | "age" | [a-c]{1,3}
table ::= "users" | "orders"
"""
GBNF_LANGUAGE = r"SELECT (name|age|[a-c]{1,3})(, (name|age|[a-c]{1,3})){0,2} FROM (users|orders)"


class Leaf(BaseModel):
    model_config = ConfigDict(extra="forbid")
    kind: Literal["leaf"]
    size: int = Field(ge=-5, le=120)
    share: float = Field(gt=0, lt=1)


class Branch(BaseModel):
    model_config = ConfigDict(extra="forbid")
    kind: Literal["branch"]
    name: str = Field(max_length=8)
    leaves: list[Leaf] = Field(min_length=1, max_length=2)


class Tree(BaseModel):
    model_config = ConfigDict(extra="forbid")
    top: Leaf | Branch = Field(discriminator="kind")
    flags: list[bool | None] = Field(max_length=3)
    code: str = Field(pattern=r"^[A-Z]{2}[0-9]{1,3}$")
    note: str | None = Field(max_length=5)


def unchecked(lark: str) -> str:
    """A grammar as no front would let through."""
    return json.dumps({"grammars": [{"lark_grammar": '%llguidance {"no_forcing": true}\n' + lark}]})


@pytest.fixture(scope="module")
def rig() -> GrammarRig:
    return GrammarRig()


def request(
    name: str, grammar: str, *, resume_from: list[int] | None = None, **sampling: Any
) -> GenerationRequest:
    parameters = {"max_tokens": 400, "temperature": 1.0, **sampling}
    return GenerationRequest(
        name, [5, 6, 7], SamplingParams(**parameters), resume_from=resume_from or [], grammar=grammar
    )


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**40), temperature=st.sampled_from([0.0, 0.7, 1.0, 2.0]))
def test_every_answer_is_accepted_by_an_independent_judge(
    rig: GrammarRig, seed: int, temperature: float
) -> None:
    sampling: dict[str, Any] = {"seed": seed, "temperature": temperature}
    requests = [request(f"re{i}", write_grammar("regex", p), **sampling) for i, p in enumerate(PATTERNS)]
    requests += [
        request("tree", write_grammar("json", json.dumps(Tree.model_json_schema())), **sampling),
        request("choice", write_grammar("choice", json.dumps(CHOICES)), top_p=0.9, **sampling),
        request("gbnf", write_grammar("grammar", GBNF), top_k=20, repetition_penalty=1.3, **sampling),
        request("free", "", seed=seed, max_tokens=40, ignore_eos=True),
    ]
    answers = rig.run(requests)
    for name, answer in answers.items():
        assert answer.finish_reason == ("length" if name == "free" else "stop"), (name, answer.error)
    for i, pattern in enumerate(PATTERNS):
        text = rig.text(answers[f"re{i}"].token_ids)
        assert re.fullmatch(pattern, text), (pattern, text)
    Tree.model_validate_json(rig.text(answers["tree"].token_ids))
    assert rig.text(answers["choice"].token_ids) in CHOICES
    assert re.fullmatch(GBNF_LANGUAGE, rig.text(answers["gbnf"].token_ids))


def test_partners_change_nothing_and_free_answers_are_what_they_were(rig: GrammarRig) -> None:
    tree = write_grammar("json", json.dumps(Tree.model_json_schema()))
    together = [
        *(request(f"tree{i}", tree, seed=i) for i in range(3)),
        *(request(f"free{i}", "", seed=i, max_tokens=30) for i in range(3)),
    ]
    # Few blocks: requests preempt each other.
    batched = rig.run(together, rig.engine(num_blocks=30, max_running=4))
    for one in together:
        alone = rig.run([one])[one.request_id]
        assert batched[one.request_id].token_ids == alone.token_ids
        assert batched[one.request_id].finish_reason == alone.finish_reason


def test_compiled_and_numpy_samplers_give_the_same_answers(
    rig: GrammarRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Greedy rows try their likeliest token before they compute a mask: most such tries succeed in free text,
    none where the form is strict."""
    if load_fused_sampling() is None:
        pytest.skip("no compiled kernels")
    forms = {
        "text": write_grammar("regex", r"[^\n]{20,300}"),
        "tree": write_grammar("json", json.dumps(Tree.model_json_schema())),
        "ends": write_grammar("regex", "a*"),
    }
    kinds: dict[str, dict[str, Any]] = {
        "greedy": {"temperature": 0.0},
        "sampled": {"top_p": 0.95, "top_k": 500},
        "penalised": {"temperature": 0.0, "repetition_penalty": 1.2, "frequency_penalty": 0.3},
        "biased": {"temperature": 0.0, "logit_bias": {0: 3.0, 66: 2.0}, "min_tokens": 3},
        "logprobs": {"temperature": 0.0, "num_logprobs": 4},
        "sampled logprobs": {"num_logprobs": 2, "presence_penalty": 1.0},
        "stopped": {"temperature": 0.0, "stop_token_ids": tuple(range(100, 900))},
    }
    requests = [
        request(f"{form} {kind}", grammar, max_tokens=60, seed=5, **sampling)
        for form, grammar in forms.items()
        for kind, sampling in kinds.items()
    ]
    num_masks = dict.fromkeys(("compiled", "numpy"), 0)
    compute = Constraint.compute_mask

    def answers(name: str, sampler: Sampler) -> dict[str, Any]:
        def counted(constraint: Constraint, end_token_ids: Any) -> None:
            num_masks[name] += 1
            compute(constraint, end_token_ids)

        monkeypatch.setattr(Constraint, "compute_mask", counted)
        ran = rig.run(requests, rig.engine(max_running=len(requests), sampler=sampler))
        return {key: (answer.finish_reason, answer.outputs) for key, answer in ran.items()}

    assert answers("compiled", Sampler(load_fused_sampling())) == answers("numpy", Sampler())
    assert num_masks["compiled"] < num_masks["numpy"] - 80


def test_guessing_ahead_changes_nothing(rig: GrammarRig) -> None:
    tree = write_grammar("json", json.dumps(Tree.model_json_schema()))
    repeat = write_grammar("regex", "((red|blue) and ){8}(red|blue)")
    requests = [request(f"tree{i}", tree, seed=i) for i in range(3)]
    requests += [request(f"repeat{i}", repeat, seed=i, temperature=0.5 * i) for i in range(3)]
    speculator = Speculator(NgramProposer(), 4)
    guessed = rig.run(requests, rig.engine(speculator=speculator))
    plain = rig.run(requests)
    for name, answer in plain.items():
        assert guessed[name].token_ids == answer.token_ids
        assert guessed[name].finish_reason == answer.finish_reason == "stop"
    assert speculator.num_accepted_tokens > 0


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_answer_resumed_after_any_token_continues_as_if_undisturbed(
    rig: GrammarRig, temperature: float
) -> None:
    sampling: dict[str, Any] = {"seed": 11, "temperature": temperature, "frequency_penalty": 0.5}
    tree = write_grammar("json", json.dumps(Tree.model_json_schema()))
    whole = rig.run([request("whole", tree, **sampling)])["whole"]
    assert whole.finish_reason == "stop"
    assert len(whole.token_ids) > 20
    cuts = range(len(whole.token_ids) + 1)  # after the last one, too: its end may not have been told
    resumed = rig.run(
        [request(str(cut), tree, resume_from=whole.token_ids[:cut], **sampling) for cut in cuts]
    )
    for cut in cuts:
        assert resumed[str(cut)].token_ids == whole.token_ids[cut:], cut
        assert resumed[str(cut)].finish_reason == "stop"


def test_an_answer_ends_with_the_token_that_completes_it(rig: GrammarRig) -> None:
    answer = rig.run([request("r", write_grammar("regex", "[ab]{3}"), min_tokens=3)])["r"]
    assert (answer.finish_reason, len(rig.text(answer.token_ids))) == ("stop", 3)
    assert answer.outputs[-1].token_ids == answer.token_ids[-1:]


def test_what_is_complete_ends_whatever_min_tokens_and_ignore_eos_say(rig: GrammarRig) -> None:
    grammar = write_grammar("choice", '["yes", "no"]')
    answers = rig.run(
        [
            request("min", grammar, min_tokens=20),
            request("ignore", grammar, ignore_eos=True),
            request("stop", write_grammar("regex", "a*"), min_tokens=4, seed=3, max_tokens=60),
        ]
    )
    assert all(rig.text(answers[name].token_ids) in ("yes", "no") for name in ("min", "ignore"))
    assert answers["min"].finish_reason == answers["ignore"].finish_reason == "stop"
    assert len(answers["stop"].token_ids) >= 4


def test_a_grammar_without_an_end_runs_to_max_tokens(rig: GrammarRig) -> None:
    answer = rig.run([request("r", write_grammar("grammar", 'start: "x" start'), max_tokens=9)])["r"]
    assert (answer.finish_reason, len(answer.token_ids)) == ("length", 9)
    assert set(rig.text(answer.token_ids)) == {"x"}


def test_an_end_of_text_is_possible_only_where_the_answer_matches(rig: GrammarRig) -> None:
    bias = dict.fromkeys(EOS, 100.0)
    answers = rig.run(
        [
            request("r", write_grammar("regex", "(ab|cd){2}[ef]*"), logit_bias=bias),
            request("s", write_grammar("regex", "a|b{5}"), logit_bias=bias, stop_token_ids=(7,)),
        ]
    )
    # It ends at the first place where it may: without its last token, it does not match.
    assert re.fullmatch("(ab|cd){2}[ef]*", rig.text(answers["r"].token_ids))
    assert not re.fullmatch("(ab|cd){2}[ef]*", rig.text(answers["r"].token_ids[:-1]))
    assert rig.text(answers["s"].token_ids) in ("a", "bbbbb")


def test_bias_and_penalties_move_what_the_grammar_allows_and_nothing_else(rig: GrammarRig) -> None:
    forbidden = rig.token_bytes.index(b"maybe")
    wanted = rig.token_bytes.index(b"no")
    answer = rig.run(
        [
            request(
                "r",
                write_grammar("choice", '["yes", "no"]'),
                temperature=0.0,
                logit_bias={forbidden: 100.0, wanted: 90.0},
            )
        ]
    )["r"]
    assert answer.token_ids == [wanted]


def test_logprobs_are_those_of_the_allowed_tokens(rig: GrammarRig) -> None:
    answer = rig.run([request("r", write_grammar("regex", "[xy]"), num_logprobs=5)])["r"]
    assert answer.outputs[0].logprobs is not None
    (entry,) = answer.outputs[0].logprobs
    assert {rig.token_bytes[token_id] for token_id, _ in entry.top} == {b"x", b"y"}
    assert sum(2.718281828**logprob for _, logprob in entry.top) == pytest.approx(1.0, abs=1e-5)


def test_a_grammar_that_does_not_work_ends_its_own_request_only(rig: GrammarRig) -> None:
    yes = write_grammar("choice", '["yes"]')
    answers = rig.run(
        [
            request("broken", "no grammar at all"),
            request("other", yes),
            request("foreign", yes, resume_from=[rig.token_bytes.index(b"no")]),
            request("free", "", max_tokens=3, ignore_eos=True),
        ]
    )
    assert answers["broken"].finish_reason == answers["foreign"].finish_reason == "error"
    assert "grammar does not work" in answers["broken"].error
    assert "resume_from" in answers["foreign"].error
    assert rig.text(answers["other"].token_ids) == "yes"
    assert answers["free"].finish_reason == "length"


def test_a_grammar_that_meets_a_limit_while_it_matches_ends_its_own_request_only(rig: GrammarRig) -> None:
    ambiguous = unchecked('start: s\ns: s s s | s s | "a" | ')
    answers = rig.run(
        [request("r", ambiguous, max_tokens=200, ignore_eos=True), request("free", "", max_tokens=3)]
    )
    assert answers["r"].finish_reason == "error"
    assert "the grammar stopped this answer" in answers["r"].error
    assert answers["free"].finish_reason in ("stop", "length")


def test_special_tokens_are_never_allowed_whatever_the_grammar_says(rig: GrammarRig) -> None:
    answer = rig.run([request("r", unchecked('start: <[7]> "a"'))])["r"]
    assert answer.finish_reason == "error"
    assert answer.token_ids == []


def test_an_abort_while_the_grammar_compiles_forgets_the_request(rig: GrammarRig) -> None:
    engine = rig.engine()
    grammar = write_grammar("choice", '["yes"]')
    engine.submit(request("r", grammar))
    with pytest.raises(InvalidRequest, match="in use"):
        engine.submit(request("r", grammar))
    assert engine.load().num_waiting == 1
    engine.abort("r")
    assert not engine.has_work()
    # The same id again, with another grammar: it must not get the first one's constraint.
    answer = rig.run([request("r", write_grammar("choice", '["no"]'))], engine)["r"]
    assert rig.text(answer.token_ids) == "no"


def test_running_requests_go_on_while_a_grammar_compiles(rig: GrammarRig) -> None:
    release = False

    class SlowCompiler:
        def prepare(self) -> None: ...

        def constrain(self, grammar: str, token_ids: Any) -> tuple[Constraint | None, str]:
            while not release:
                time.sleep(0.001)
            return rig.compiler.constrain(grammar, token_ids)

    engine = rig.engine()
    engine._grammars = GrammarQueue(SlowCompiler)
    engine.submit(request("r", write_grammar("choice", '["yes"]')))
    engine.submit(request("free", "", max_tokens=5, ignore_eos=True))
    seen = [output.request_id for _ in range(5) for output in engine.step().outputs]
    assert seen == ["free"] * 5
    assert engine.step().outputs == []  # idle but for the grammar: it waits a moment, and says nothing
    release = True
    outputs = [output for _ in range(200) if engine.has_work() for output in engine.step().outputs]
    assert rig.text([token_id for output in outputs for token_id in output.token_ids]) == "yes"


def test_a_grammar_that_never_compiles_is_given_up(rig: GrammarRig) -> None:
    class StuckCompiler:
        def prepare(self) -> None: ...

        def constrain(self, grammar: str, token_ids: Any) -> tuple[Constraint | None, str]:
            time.sleep(1.0)
            return None, "too late"

    engine = rig.engine()
    engine._grammars = GrammarQueue(StuckCompiler)
    engine.submit(request("r", "any"))
    engine._clock.advance(COMPILE_LIMIT_S + 1)  # type: ignore[attr-defined]
    (output,) = engine.step().outputs
    assert (output.finish_reason, "not compiled within" in output.error) == ("error", True)
    assert not engine.has_work()


def test_an_idle_engine_prepares_for_its_first_grammar_and_a_busy_one_does_not(
    rig: GrammarRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammar_queue, "_IDLE_POLL_S", 0.001)
    asked, prepared = threading.Semaphore(0), threading.Event()

    class Recorder:
        def prepare(self) -> None:
            prepared.set()

        def constrain(self, grammar: str, token_ids: Any) -> tuple[Constraint | None, str]:
            return rig.compiler.constrain(grammar, token_ids)

    engine = rig.engine()
    grammars = engine._grammars = GrammarQueue(Recorder)
    engine.submit(request("free", "", max_tokens=2, ignore_eos=True))

    def is_idle() -> bool:
        asked.release()
        return not engine.has_work()

    grammars.prepare_when(is_idle)
    for _ in range(3):
        assert asked.acquire(timeout=10)
    assert not prepared.is_set()
    while engine.has_work():
        engine.step()
    assert prepared.wait(timeout=10)
    answer = rig.run([request("r", write_grammar("choice", '["yes"]'))], engine)["r"]
    assert rig.text(answer.token_ids) == "yes"


def test_a_preparation_that_fails_fails_again_for_the_first_grammar_and_says_why(
    rig: GrammarRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammar_queue, "_IDLE_POLL_S", 0.001)
    tried = threading.Semaphore(0)

    def fail() -> Any:
        tried.release()
        raise OSError("no such vocabulary")

    engine = rig.engine()
    engine._grammars = GrammarQueue(fail)
    engine._grammars.prepare_when(lambda: True)
    assert tried.acquire(timeout=10)
    answer = rig.run([request("r", write_grammar("choice", '["yes"]'))], engine)["r"]
    assert answer.finish_reason == "error"
    assert "no such vocabulary" in answer.error
