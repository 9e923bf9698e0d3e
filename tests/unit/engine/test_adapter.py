"""The adapter over a fake backend: who is open, whose time a step was, how a generation goes on."""

from __future__ import annotations

import asyncio

import pytest

from headrace.api.messages import EngineReady, GenerationRequest, SamplingParams, StepBatch, TokenLogprobs
from headrace.clock import VirtualClock
from headrace.engine.adapter import (
    AdaptedEngine,
    BackendOutput,
    BackendStep,
    continued_request,
    warm_up,
    without_end,
)
from headrace.errors import EngineDead, InvalidRequest

READY = EngineReady("fake", "FakeForCausalLM", 100, 64, 8, 10, 4, "float32 fake", {})
STEP_S = 0.5


class FakeBackend:
    """A Backend whose steps the test writes. Shipped with the tests of what drives it."""

    def __init__(self) -> None:
        self.ready = READY
        self.adapters = ("pirate",)
        self.submitted: list[GenerationRequest] = []
        self.submissions: asyncio.Queue[GenerationRequest] = asyncio.Queue()
        self.aborted: list[str] = []
        self.refusal = ""
        self.num_checks = 0
        self.is_closed = False
        self.steps: asyncio.Queue[BackendStep | Exception] = asyncio.Queue()

    async def submit(self, request: GenerationRequest) -> None:
        if self.refusal:
            raise InvalidRequest(self.refusal)
        self.submitted.append(request)
        self.submissions.put_nowait(request)

    async def abort(self, request_id: str) -> None:
        self.aborted.append(request_id)

    async def next_step(self) -> BackendStep:
        step = await self.steps.get()
        if isinstance(step, Exception):
            raise step
        return step

    async def check(self) -> None:
        self.num_checks += 1

    def close(self) -> None:
        self.is_closed = True


class Rig:
    """An adapted engine on a virtual clock."""

    def __init__(self) -> None:
        self.clock = VirtualClock()
        self.backend = FakeBackend()
        self.engine = AdaptedEngine(self.backend, self.clock)

    async def submit(self, request_id: str, num_prompt: int = 3, **fields: object) -> None:
        await self.engine.submit(request(request_id, num_prompt, **fields))

    async def step(self, step: BackendStep) -> StepBatch:
        self.clock.advance(STEP_S)
        self.backend.steps.put_nowait(step)
        return await self.engine.next_batch()


def request(request_id: str, num_prompt: int = 3, **fields: object) -> GenerationRequest:
    sampling = SamplingParams(max_tokens=8, temperature=0.0)
    return GenerationRequest(request_id, [1] * num_prompt, sampling, **fields)  # type: ignore[arg-type]


def first(request_id: str, token: int, num_cached: int = 0) -> BackendOutput:
    return BackendOutput(request_id, [token], num_cached_tokens=num_cached)


async def test_a_request_runs_from_submit_to_its_end() -> None:
    rig = Rig()
    await rig.submit("a")
    assert rig.engine.has_work()
    assert rig.engine.load().num_waiting == 1
    batch = await rig.step(BackendStep([first("a", 7, num_cached=2)], num_running=1, num_prompt_tokens=1))
    (output,) = batch.outputs
    assert (output.token_ids, output.num_cached_tokens, output.finish_reason) == ([7], 2, None)
    assert (batch.load.num_running, batch.load.num_waiting, batch.load.num_uncomputed_tokens) == (1, 0, 0)
    batch = await rig.step(BackendStep([BackendOutput("a", [8], "length")]))
    (output,) = batch.outputs
    assert (output.token_ids, output.finish_reason, output.num_cached_tokens) == ([8], "length", 0)
    assert not rig.engine.has_work()
    assert output.engine_ns == batch.load.busy_ns == int(2 * STEP_S * 1e9)


async def test_all_time_is_somebodys_or_idle() -> None:
    rig = Rig()
    start_ns = rig.clock.now_ns()
    rig.clock.advance(3.0)
    await rig.submit("a", 20)
    await rig.submit("b", 30)
    spent: dict[str, int] = {}
    for step in (
        BackendStep([], num_running=2, num_prompt_tokens=16),
        BackendStep([first("a", 1)], num_running=2, num_prompt_tokens=16),
        BackendStep([BackendOutput("a", [2]), first("b", 1)], num_running=2, num_prompt_tokens=18),
        BackendStep([BackendOutput("a", [3], "stop"), BackendOutput("b", [2], "length")]),
    ):
        batch = await rig.step(step)
        spent |= {output.request_id: output.engine_ns for output in batch.outputs}
    rig.clock.advance(1.0)
    load = rig.engine.load()
    assert sum(spent.values()) == load.busy_ns == int(4 * STEP_S * 1e9)
    assert load.busy_ns + load.idle_ns == rig.clock.now_ns() - start_ns
    assert load.step_model is not None
    assert load.step_model.num_steps == 4


async def test_prompt_tokens_are_laid_on_open_prompts_in_their_order() -> None:
    rig = Rig()
    await rig.submit("a", 20)
    await rig.submit("b", 30)
    batch = await rig.step(BackendStep([], num_prompt_tokens=16))
    assert batch.load.num_uncomputed_tokens == 34
    batch = await rig.step(BackendStep([first("a", 1)], num_prompt_tokens=16))
    assert batch.load.num_uncomputed_tokens == 30 - 12
    batch = await rig.step(BackendStep([BackendOutput("a", [1])], num_prompt_tokens=1_000_000))
    assert batch.load.num_uncomputed_tokens == 1, "its last token is computed with its first output"


async def test_steps_that_tell_nothing_of_prompts_are_shared_all_the_same() -> None:
    rig = Rig()
    await rig.submit("a", 20)
    await rig.step(BackendStep([]))
    batch = await rig.step(BackendStep([first("a", 1)]))
    assert batch.outputs[0].engine_ns == batch.load.busy_ns == int(2 * STEP_S * 1e9)


async def test_what_comes_for_a_request_that_was_aborted_is_nobodys() -> None:
    rig = Rig()
    await rig.submit("a")
    await rig.submit("b")
    await rig.engine.abort("a")
    await rig.engine.abort("unknown")
    batch = await rig.step(BackendStep([first("a", 1), first("b", 2)]))
    assert [output.request_id for output in batch.outputs] == ["b"]
    assert rig.backend.aborted == ["a"]


async def test_a_request_that_the_backend_refuses_leaves_nothing_behind() -> None:
    rig = Rig()
    rig.backend.refusal = "no such thing"
    with pytest.raises(InvalidRequest, match="no such thing"):
        await rig.submit("a")
    assert not rig.engine.has_work()
    rig.backend.refusal = ""
    await rig.submit("a")
    with pytest.raises(InvalidRequest, match="in use"):
        await rig.submit("a")
    assert len(rig.backend.submitted) == 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lora": "x"}, "LoRA 'x'"),
        ({"num_prompt": 64}, "the context holds 64"),
        ({"num_prompt": 0}, "no tokens"),
    ],
)
async def test_what_can_never_run_does_not_reach_the_backend(fields: dict[str, object], message: str) -> None:
    rig = Rig()
    with pytest.raises(InvalidRequest, match=message):
        await rig.submit("a", **fields)  # type: ignore[arg-type]
    assert rig.backend.submitted == []


async def test_counts_add_up_and_blocks_follow_the_usage() -> None:
    rig = Rig()
    await rig.submit("a")
    for _ in range(2):
        batch = await rig.step(
            BackendStep(
                [],
                num_running=1,
                kv_usage_ratio=0.25,
                num_preemptions=1,
                prefix_query_tokens=10,
                prefix_hit_tokens=4,
                num_draft_tokens=6,
                num_accepted_tokens=5,
                evicted=[b"x"],
            )
        )
    load = batch.load
    assert (load.num_preemptions, load.prefix_query_tokens, load.prefix_hit_tokens) == (2, 20, 8)
    assert (load.num_draft_tokens, load.num_accepted_tokens, load.steps) == (12, 10, 2)
    assert (load.num_free_blocks, load.num_total_blocks) == (8, 10)
    assert batch.evicted == [b"x"]


async def test_a_dead_backend_is_said_at_once() -> None:
    rig = Rig()
    rig.backend.steps.put_nowait(EngineDead("gone"))
    with pytest.raises(EngineDead, match="gone"):
        await rig.engine.next_batch()


async def test_a_warm_up_ends_with_its_answer() -> None:
    backend = FakeBackend()
    backend.steps.put_nowait(BackendStep([]))
    backend.steps.put_nowait(BackendStep([first("warm-up", 1)]))
    backend.steps.put_nowait(BackendStep([BackendOutput("warm-up", [2], "length")]))
    backend.steps.put_nowait(BackendStep([]))
    await warm_up(backend)
    assert backend.steps.qsize() == 1
    assert backend.submitted[0].sampling.num_logprobs == 1


async def test_a_backend_that_gives_a_request_up_by_itself_is_lost_and_one_that_was_told_to_is_not() -> None:
    rig = Rig()
    await rig.submit("told")
    await rig.submit("not told")
    await rig.engine.abort("told")
    await rig.step(BackendStep([BackendOutput("told", [], "aborted")]))
    with pytest.raises(EngineDead, match="gave up a request by itself"):
        await rig.step(BackendStep([BackendOutput("not told", [], "aborted")]))


def test_a_continued_generation_is_its_tokens_as_a_prompt_and_counts_what_is_left() -> None:
    sampling = SamplingParams(max_tokens=8, min_tokens=3, seed=5)
    original = GenerationRequest("a", [1, 2], sampling, resume_from=[3, 4], cache_salt="s", priority=2)
    continued = continued_request(original)
    assert (continued.prompt_token_ids, continued.resume_from) == ([1, 2, 3, 4], [])
    assert (continued.sampling.max_tokens, continued.sampling.min_tokens) == (6, 1)
    assert (continued.cache_salt, continued.priority) == ("s", 2)
    assert continued.sampling.seed != 5
    assert continued == continued_request(original), "a pure function of seed and index"
    fresh = GenerationRequest("a", [1, 2], sampling)
    assert continued_request(fresh) is fresh


def test_a_grammar_cannot_begin_in_its_middle() -> None:
    resumed = GenerationRequest("a", [1], SamplingParams(), resume_from=[2], grammar="{}")
    with pytest.raises(InvalidRequest, match="cut after 1 tokens"):
        continued_request(resumed)


def test_the_token_that_ends_an_answer_is_no_part_of_it() -> None:
    logprobs = [TokenLogprobs(-0.1), TokenLogprobs(-0.2)]
    assert without_end([4, 2], logprobs) == ([4], logprobs[:1])
    assert without_end([2], None) == ([], None)
    assert without_end([], None) == ([], None)


async def test_an_adapter_that_it_has_reaches_the_backend_also_of_a_stream_that_goes_on() -> None:
    rig = Rig()
    await rig.submit("a", lora="pirate", resume_from=[5, 6])
    (submitted,) = rig.backend.submitted
    assert (submitted.lora, submitted.prompt_token_ids[-2:]) == ("pirate", [5, 6])
    with pytest.raises(InvalidRequest, match="'poet' was asked for; adapters of this engine are: pirate"):
        await rig.submit("b", lora="poet")
    assert rig.engine.has_work()
