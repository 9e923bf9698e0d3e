"""Decisions of the router: how many per second of one core, how fast, and what held requests cost in memory.

The real router process, asked over its socket as HAProxy asks; meanwhile replicas report and requests end.
"""

from __future__ import annotations

import asyncio
import gc
import random
import time
from dataclasses import dataclass, field

import psutil
import uvloop

from benchmarks.report import Aim, Report, Table
from benchmarks.router_rig import NUM_REPLICAS, NUM_TENANTS, Surroundings, gateway, wait_until
from benchmarks.spop_client import (
    Question,
    SpopClient,
    make_questions,
    notify_frame,
    request_id_of,
)
from headrace.bench.statistics import summarise
from headrace.policy.prompt import read_prompt
from headrace.units import MIB

NUM_CONNECTIONS = 16
DEPTH = 16
"""Questions in flight per connection under full load; HAProxy allows 20."""
NUM_QUESTIONS = 4096
HEAD_BYTES = 4096
RATES = (1_000, 5_000, 10_000)
NUM_HELD, HELD_HEAD_BYTES, HELD_CONNECTIONS = 8_000, 16_384, 400
AIM_PER_S, AIM_RATE, AIM_P99_MS, AIM_MIB = 20_000, 10_000, 1.0, 300


def run(*, is_quick: bool) -> Report:
    """Measure full load, several rates, and held requests."""
    window_s, num_held = (1.0, 1000) if is_quick else (5.0, NUM_HELD)
    report = Report(
        "router",
        "The router's decisions",
        "The real router process, with HAProxy beside it but idle. A client in the benchmark's process sends "
        f"NOTIFY frames with all arguments of the rendered spoe.conf and {HEAD_BYTES:,} bytes of body "
        f"({NUM_QUESTIONS} prompts of {NUM_TENANTS} tenants with limits; the first kilobyte of a tenant's "
        f"prompts is the same) over {NUM_CONNECTIONS} pipelined connections. {NUM_REPLICAS} replicas report "
        "every 50 ms: each decision's end, and blocks cached and evicted; each end also arrives as a "
        "completion line. All of it is in the router's CPU time.",
    )
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        loads = runner.run(measure_loads(window_s))
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        held = runner.run(measure_held(num_held))
    _write(report, loads, held)
    return report


@dataclass
class Window:
    """One stretch of steady load."""

    title: str
    rate: float = 0.0
    """Asked for; 0: as many as the router takes."""
    elapsed_s: float = 0.0
    cpu_s: float = 0.0
    num_answers: int = 0
    num_refused: int = 0
    times_s: list[float] = field(default_factory=list)

    @property
    def us_per_decision(self) -> float:
        return self.cpu_s * 1e6 / max(1, self.num_answers)

    @property
    def per_core(self) -> float:
        """Decisions per second of the router's CPU time."""
        return self.num_answers / self.cpu_s


class Driver:
    """Asks, takes answers, and ends each request at its replica's next report."""

    def __init__(self, surroundings: Surroundings, questions: list[Question]) -> None:
        self._surroundings = surroundings
        self._questions = questions
        self._hashes = [read_prompt(one.head, len(one.head), one.tenant).hashes for one in questions]
        self._clients: list[SpopClient] = []
        self._open: dict[int, tuple[float, str, int]] = {}
        self._num_sent = 0
        self._start_s = 0.0
        self.is_closed_loop = False
        self.window = Window("")

    async def connect(self, num: int) -> None:
        """Open the connections."""
        loop = asyncio.get_running_loop()
        path = self._surroundings.paths.spoe_socket
        for _ in range(num):
            _, client = await loop.create_unix_connection(lambda: SpopClient(self._on_answers), path)
            await asyncio.wait_for(client.greeted, 5.0)
            self._clients.append(client)

    @property
    def num_open(self) -> int:
        return len(self._open)

    def ask(self, client: SpopClient, num: int) -> None:
        """Send `num` questions in one piece."""
        now_s = time.monotonic()
        frames = []
        for _ in range(num):
            stream_id = self._num_sent
            self._num_sent += 1
            position = stream_id % len(self._questions)
            request_id = request_id_of(stream_id)
            self._open[stream_id] = (now_s, request_id, position)
            frames.append(notify_frame(stream_id, request_id, self._questions[position]))
        client.send(b"".join(frames))

    async def ask_all_at_once(self, num: int) -> None:
        """Send `num` questions over all connections, and let the loop send them."""
        for number in range(num):
            self.ask(self._clients[number % len(self._clients)], 1)
            if number % 100 == 0:
                await asyncio.sleep(0)

    async def run_closed(self, window: Window, seconds: float) -> None:
        """Keep DEPTH questions in flight per connection."""
        self.window, self.is_closed_loop = window, True
        for client in self._clients:
            self.ask(client, DEPTH)
        self._start_s = time.monotonic()
        end_s = self._start_s + seconds
        while time.monotonic() < end_s:
            self._surroundings.flush()
            await asyncio.sleep(0.002)
        self.is_closed_loop = False
        await self._drain()

    async def run_open(self, window: Window, seconds: float, rate: float) -> None:
        """Ask at Poisson times. The loop turns without rest: timers are too coarse for these rates."""
        self.window = window
        source = random.Random(int(rate))
        self._start_s = due_s = flush_s = time.monotonic()
        while due_s < self._start_s + seconds:
            now_s = time.monotonic()
            while due_s <= now_s:
                self.ask(self._clients[self._num_sent % len(self._clients)], 1)
                due_s += source.expovariate(rate)
            if now_s >= flush_s:
                self._surroundings.flush()
                flush_s = now_s + 0.002
            await asyncio.sleep(0)
        await self._drain()

    async def _drain(self) -> None:
        await wait_until(lambda: not self._open)
        self.window.elapsed_s = time.monotonic() - self._start_s
        self._surroundings.flush()
        await asyncio.sleep(0.1)  # two report periods: the ends reach the router

    def _on_answers(self, client: SpopClient, answers: list[tuple[int, str]]) -> None:
        now_s = time.monotonic()
        window, surroundings = self.window, self._surroundings
        for stream_id, server in answers:
            sent_s, request_id, position = self._open.pop(stream_id)
            window.times_s.append(now_s - sent_s)
            replica = surroundings.replicas.get(server)
            if replica is None:
                window.num_refused += 1
                continue
            replica.finish(request_id, self._questions[position].tenant, self._hashes[position])
            surroundings.complete(request_id, server)
        window.num_answers += len(answers)
        if self.is_closed_loop:
            self.ask(client, len(answers))

    def close(self) -> None:
        for client in self._clients:
            client.close()


async def measure_loads(window_s: float) -> list[Window]:
    """Full load, then the rates of RATES."""
    async with gateway() as (surroundings, router):
        await surroundings.start_replicas()
        driver = Driver(surroundings, make_questions(surroundings.spec, NUM_QUESTIONS, HEAD_BYTES, 1))
        await driver.connect(NUM_CONNECTIONS)
        gc.collect()
        gc.freeze()  # the questions are no garbage: the client's collections must not delay it
        await driver.run_closed(Window("warm-up"), 1.0)
        windows = [Window("full load"), *(Window(f"{rate:,}/s", rate) for rate in RATES)]
        for window in windows:
            cpu_s = _cpu_s(router)
            if window.rate:
                await driver.run_open(window, window_s, window.rate)
            else:
                await driver.run_closed(window, window_s)
            window.cpu_s = _cpu_s(router) - cpu_s
        driver.close()
        gc.unfreeze()
    return windows


@dataclass
class Held:
    """What held requests cost, and how fast they go when there is room."""

    num: int
    before_bytes: int
    during_bytes: int
    taken_s: float
    released_s: float
    cpu_s: float
    num_refused: int


async def measure_held(num: int) -> Held:
    """Ask while there is no replica, then let replicas come."""
    async with gateway() as (surroundings, router):
        questions = make_questions(surroundings.spec, 512, HELD_HEAD_BYTES, 2)
        driver = Driver(surroundings, questions)
        await driver.connect(HELD_CONNECTIONS)
        await wait_until(lambda: surroundings.demand is not None)
        before_bytes = router.memory_info().rss
        start_s = time.monotonic()
        await driver.ask_all_at_once(num)
        await wait_until(lambda: _num_held(surroundings) == num, 60.0)
        taken_s = time.monotonic() - start_s
        await asyncio.sleep(1.0)
        during_bytes = router.memory_info().rss
        cpu_s = _cpu_s(router)
        start_s = time.monotonic()
        await surroundings.start_replicas()
        await wait_until(lambda: not driver.num_open, 60.0)
        released_s = time.monotonic() - start_s
        cpu_s = _cpu_s(router) - cpu_s
        driver.close()
        return Held(num, before_bytes, during_bytes, taken_s, released_s, cpu_s, driver.window.num_refused)


def _num_held(surroundings: Surroundings) -> int:
    demand = surroundings.demand
    return sum(endpoint.num_held for endpoint in demand.endpoints) if demand is not None else 0


def _cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


def _write(report: Report, windows: list[Window], held: Held) -> None:
    rows = []
    for window in windows:
        found = summarise(window.times_s, 1e3)
        assert found is not None, "a window without an answer"
        rows.append(
            [
                window.title,
                f"{window.num_answers / window.elapsed_s:,.0f}",
                f"**{window.us_per_decision:.1f}**",
                f"{window.per_core:,.0f}",
                f"{window.cpu_s / window.elapsed_s:.2f}",
                *(f"{value:.3f}" for value in (found.p50, found.p90, found.p99, found.max)),
                str(window.num_refused),
            ]
        )
        report.data[window.title] = {
            "decisions_per_s": window.num_answers / window.elapsed_s,
            "cpu_us_per_decision": window.us_per_decision,
            "p50_ms": found.p50,
            "p99_ms": found.p99,
            "refused": window.num_refused,
        }
    headers = (
        "load",
        "decisions/s",
        "CPU µs per decision",
        "per s of CPU",
        "of a core",
        "p50 ms",
        "p90",
        "p99",
    )
    report.tables.append(Table("Decisions", (*headers, "longest", "refused"), rows))
    memory = [
        [
            f"{held.num:,} of {HELD_HEAD_BYTES:,} bytes",
            f"{held.before_bytes / MIB:.0f}",
            f"**{held.during_bytes / MIB:.0f}**",
            f"{(held.during_bytes - held.before_bytes) / held.num:,.0f}",
            f"{held.taken_s:.2f}",
            f"{held.released_s:.2f}",
            f"{held.cpu_s:.2f}",
            str(held.num_refused),
        ]
    ]
    held_headers = ("held requests", "MiB before", "MiB while held", "bytes each", "s to take them")
    released = ("s from the first report to the last answer", "CPU s for it", "refused")
    report.tables.append(Table("Held requests", (*held_headers, *released), memory))
    report.data["held"] = {"bytes": held.during_bytes, "num": held.num, "released_s": held.released_s}
    full, at_rate = windows[0], windows[1 + RATES.index(AIM_RATE)]
    found = summarise(at_rate.times_s, 1e3)
    assert found is not None
    mebibytes = held.during_bytes / MIB
    report.aims += [
        Aim(
            "decisions per second of CPU, full load",
            f"at least {AIM_PER_S:,}",
            f"{full.per_core:,.0f}",
            full.per_core >= AIM_PER_S,
        ),
        Aim(
            f"p99 at {AIM_RATE:,}/s",
            f"at most {AIM_P99_MS:g} ms",
            f"{found.p99:.2f} ms",
            found.p99 <= AIM_P99_MS,
        ),
        Aim(
            f"resident memory, {held.num:,} held",
            f"at most {AIM_MIB} MiB",
            f"{mebibytes:.0f} MiB",
            mebibytes <= AIM_MIB,
        ),
    ]
    report.caveats += [
        "The client takes most of another core; with anything else on the machine, both wait for each other. "
        "CPU per decision suffers less from that than times and rates.",
        "Answer times count from the write of the question to the reading of its answer, in the client.",
        "Under full load frames arrive many at a time, which is cheaper than one by one; HAProxy at a low "
        "rate sends one by one, as the rates here do.",
    ]
