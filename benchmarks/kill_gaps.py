"""What a client sees of a killed engine: the time from the kill to its stream's next text, by context length.

One stream at a time. Beside each killed one stands an undisturbed one of the same length, with a prompt of
its own, so that no cache helps either. Owns the kills; must not know how streams survive them.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from dataclasses import dataclass

from benchmarks.report import Table
from benchmarks.watched_replicas import replicas_of, wait_for
from benchmarks.watched_streams import Ask, StreamResult, ask, make_client
from headrace.bench.statistics import percentile
from headrace.control.serve import System

CONTEXTS = (100, 500, 1500)
"""Prompt tokens, about."""
TOKENS_PER_WORD = 4.87
NUM_TEMPLATE_TOKENS = 35
NUM_TOKENS = 60
UNDISTURBED = ("undisturbed: between texts, p50", "undisturbed: first text, p50")
MOST_BEFORE_KILL = 30
"""The kill comes after 1 to so many texts."""


@dataclass(frozen=True)
class Kill:
    """One engine that was killed under one stream. Seconds."""

    context: int
    is_begun: bool
    """The stream had given text before."""
    num_prompt_tokens: int
    gap_s: float
    """From the kill to the next text."""
    usual_s: float
    """The undisturbed stream's median time between texts."""
    first_s: float
    """The undisturbed stream's time to its first text: what computing so much of a prompt takes at least."""


def measure_kills(system: System, number: int, is_begun: bool) -> list[Kill]:
    """Kill one engine for each length of context, with prompts and moments of this number's own."""
    chance = random.Random(number)
    kills = []
    for context in CONTEXTS:
        wait_for(system, lambda replicas: sum(r.state == "ready" for r in replicas) == 2)
        kills.append(asyncio.run(_one_kill(system, context, is_begun, number * 10_000 + context, chance)))
    return kills


async def _one_kill(system: System, context: int, is_begun: bool, seed: int, chance: random.Random) -> Kill:
    num_words = int((context - NUM_TEMPLATE_TOKENS) / TOKENS_PER_WORD)
    async with make_client(1) as client:
        calm = await ask(client, system.url, Ask(seed, num_words, NUM_TOKENS))
        usual_s, first_s = percentile(calm.usual_gaps_s(), 0.5), calm.first_s - calm.begin_s
        streams: list[StreamResult] = []
        reading = asyncio.create_task(ask(client, system.url, Ask(seed + 1, num_words, NUM_TOKENS), streams))
        after = chance.randint(1, MOST_BEFORE_KILL) if is_begun else 0
        # The stream is another task's, and the reader knows no events.
        while not reading.done() and not (streams and len(streams[0].pieces) >= after):  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        pid = 0
        while not reading.done() and not pid:
            replicas = await asyncio.to_thread(replicas_of, system)
            pid = next((r.engine_pid for r in replicas if r.num_running + r.num_waiting), 0)
        stream = streams[0] if streams else await reading
        num_before, killed_s = len(stream.pieces), time.monotonic()
        if pid:
            os.kill(pid, signal.SIGKILL)
        result = await reading
    if not result.is_done or result.error:
        raise RuntimeError(f"the stream did not survive: {result.error or 'cut'}")
    gap_s = result.gap_after_s(killed_s)
    if not pid or gap_s is None:
        raise RuntimeError("the stream was over before its engine was killed")
    return Kill(context, num_before > 0, result.usage[0], gap_s, usual_s, first_s)


def gap_tables(kills: list[Kill], of_what: str) -> list[Table]:
    """Return the distribution for kills in the middle of answers, and for kills before their first text."""
    titles = {
        True: f"From the kill of the engine to the stream's next text, ms, {of_what}",
        False: f"The same for kills before the stream's first text, ms, {of_what}",
    }
    tables = []
    for is_begun, title in titles.items():
        rows = []
        for context in CONTEXTS:
            here = [kill for kill in kills if kill.context == context and kill.is_begun is is_begun]
            if not here:
                continue
            gaps_s = sorted(kill.gap_s for kill in here)
            calm_s = [
                percentile(sorted(values), 0.5)
                for values in ([kill.usual_s for kill in here], [kill.first_s for kill in here])
            ]
            figures = [gaps_s[0], *(percentile(gaps_s, rank) for rank in (0.5, 0.9, 0.99, 1.0)), *calm_s]
            num_tokens = percentile(sorted(kill.num_prompt_tokens for kill in here), 0.5)
            cells = [f"{seconds * 1000:.0f}" for seconds in figures]
            rows.append([f"{num_tokens:.0f}", str(len(here)), *cells])
        headers = ("prompt tokens", "kills", "least", "p50", "p90", "p99", "most", *UNDISTURBED)
        tables.append(Table(title, headers, rows))
    return tables
