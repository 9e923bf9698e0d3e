"""The real grammar worker: verdicts, its death by a grammar that is too much, and the front's own limits."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import AsyncIterator

import pytest

from headrace.errors import InvalidRequest, Overloaded
from headrace.replica import grammar_checker
from headrace.replica.grammar_checker import GrammarChecker
from headrace.replica.structured_output import OutputForm

pytestmark = pytest.mark.slow
WORDS = OutputForm("choice", '["yes","no"]', "guided_choice")
# Passes the library's own limits, and takes it seconds.
ENDLESS = OutputForm(
    "json",
    json.dumps({"type": "string", "allOf": [{"pattern": f"(.*a.{{{200 + i}}})"} for i in range(60)]}),
    "guided_json",
)


@pytest.fixture
async def checker() -> AsyncIterator[GrammarChecker]:
    checker = GrammarChecker()
    yield checker
    await checker.close()


def pid_of(checker: GrammarChecker) -> int:
    assert checker._process is not None
    return checker._process.pid


async def test_a_verdict_is_kept_good_or_bad(checker: GrammarChecker) -> None:
    wrong = OutputForm("regex", "(a", "guided_regex")
    first = await checker.compile(WORDS)
    assert json.loads(first)["grammars"]
    for _ in range(3):
        assert await checker.compile(WORDS) == first
        with pytest.raises(InvalidRequest, match="unclosed group") as caught:
            await checker.compile(wrong)
        assert (caught.value.param, caught.value.code) == ("guided_regex", "invalid_value")
    assert checker.num_compiled == 2


async def test_many_requests_for_one_grammar_compile_it_once(checker: GrammarChecker) -> None:
    grammars = await asyncio.gather(*(checker.compile(WORDS) for _ in range(20)))
    assert len(set(grammars)) == 1
    assert checker.num_compiled == 1


async def test_a_grammar_that_takes_too_long_costs_its_own_request_and_a_second_of_cpu(
    checker: GrammarChecker,
) -> None:
    await checker.compile(WORDS)
    longest_pause_s = 0.0

    async def watch() -> None:
        nonlocal longest_pause_s
        while True:
            begin_s = time.thread_time()
            await asyncio.sleep(0.001)
            # The loop's own work: what other processes do to the clock is not its fault.
            longest_pause_s = max(longest_pause_s, time.thread_time() - begin_s)

    watching = asyncio.create_task(watch())
    hostile = asyncio.create_task(checker.compile(ENDLESS))
    other = asyncio.create_task(checker.compile(OutputForm("regex", "[0-9]+", "guided_regex")))
    with pytest.raises(InvalidRequest, match="too long to compile"):
        await hostile
    assert "grammars" in await other
    watching.cancel()
    assert longest_pause_s < 0.1
    with pytest.raises(InvalidRequest, match="too long to compile"):
        await checker.compile(ENDLESS)  # remembered: it costs nothing more
    assert checker.num_compiled == 3


async def test_a_worker_that_was_killed_is_replaced(checker: GrammarChecker) -> None:
    await checker.compile(WORDS)
    before = pid_of(checker)
    os.kill(before, signal.SIGKILL)
    process = checker._process
    assert process is not None
    await asyncio.wait_for(process.wait(), 5)
    assert "grammars" in await checker.compile(OutputForm("regex", "b", "guided_regex"))
    assert pid_of(checker) != before


async def test_a_request_that_is_cancelled_leaves_no_verdict_for_the_next(checker: GrammarChecker) -> None:
    hostile = asyncio.create_task(checker.compile(ENDLESS))
    await asyncio.sleep(0)
    while checker._process is None:  # noqa: ASYNC110
        await asyncio.sleep(0.005)
    hostile.cancel()
    with pytest.raises(asyncio.CancelledError):
        await hostile
    grammar = await checker.compile(WORDS)
    assert "yes" in grammar


async def test_too_many_waiting_requests_are_told_to_come_again(
    checker: GrammarChecker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammar_checker, "MAX_WAITING", 2)
    forms = [OutputForm("regex", "a" * n, "guided_regex") for n in range(1, 6)]
    results = await asyncio.gather(*(checker.compile(form) for form in forms), return_exceptions=True)
    refused = [result for result in results if isinstance(result, Overloaded)]
    assert len(refused) == 3
    assert all(error.retry_after_s for error in refused)


async def test_the_cache_is_bounded(checker: GrammarChecker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar_checker, "_CACHE_BYTES", 4000)
    for n in range(1, 30):
        await checker.compile(OutputForm("regex", "a" * n, "guided_regex"))
    assert checker._cached_bytes <= 4000
    assert len(checker._verdicts) < 29


async def test_the_worker_ends_with_the_checker(checker: GrammarChecker) -> None:
    await checker.compile(WORDS)
    pid = pid_of(checker)
    await checker.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
