"""Shares of one endpoint: a light tenant beside a flood, equal and weighted tenants, and what fairness costs.

Tenants are told apart by their keys, as users' are. Shares are of work as it is charged: tokens by the costs
that the engine measured, which on a busy machine are not its settings. Throughput is of tokens alone.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from hashlib import sha256
from statistics import quantiles

import headrace
from benchmarks.dispatcher import DispatcherRig
from benchmarks.report import Aim, Report, Table
from benchmarks.system import ENDPOINT, free_port, simulated
from headrace.api.config_loader import parse_config
from headrace.bench.load import LoadRun, LoadSpec, run_load
from headrace.bench.target import parse_target
from headrace.bench.workload import ROUTE_PATHS, Lengths, Workload
from headrace.control.serve import System

STEP_MS = 5.0
PREFILL_MS_PER_TOKEN = 0.02
NUM_SLOTS = 64
"""Requests that the engine computes together."""
LIGHT = 4
FLOOD = 20 * LIGHT
WEIGHTS = {"one": 1.0, "two": 2.0, "four": 4.0}
EQUAL = ("short", "long-answers", "long-prompts", "mixed")
AIM_TTFT, AIM_JAIN, AIM_THROUGHPUT, AIM_CPU_US = 1.5, 0.98, 0.98, 15.0
RAMP_S = 5.0


@dataclass(frozen=True)
class TenantLoad:
    """A tenant's closed loop: so many requests at a time. Lengths in words and tokens."""

    tenant: str
    concurrency: int
    words: Lengths
    output: Lengths


@dataclass(frozen=True)
class Work:
    """What a tenant got."""

    charged_s: float
    """Engine-seconds by the engine's measured costs."""
    prompt_tokens: int
    output_tokens: int

    def since(self, before: Work) -> Work:
        return Work(
            self.charged_s - before.charged_s,
            self.prompt_tokens - before.prompt_tokens,
            self.output_tokens - before.output_tokens,
        )

    @property
    def nominal_s(self) -> float:
        """Engine-seconds by the engine's settings, with all slots taken."""
        prompt_ms = self.prompt_tokens * PREFILL_MS_PER_TOKEN
        return (prompt_ms + self.output_tokens * STEP_MS / NUM_SLOTS) / 1e3


LIGHT_LOAD = TenantLoad("light", LIGHT, Lengths("uniform", 550, 650), Lengths("uniform", 150, 250))
FLOOD_LOAD = TenantLoad("flood", FLOOD, Lengths("uniform", 4, 12), Lengths("uniform", 32, 96))
EQUAL_LOADS = (
    TenantLoad("short", 40, Lengths("uniform", 4, 12), Lengths("uniform", 16, 48)),
    TenantLoad("long-answers", 40, Lengths("uniform", 4, 12), Lengths("uniform", 200, 400)),
    TenantLoad("long-prompts", 40, Lengths("uniform", 200, 400), Lengths("uniform", 16, 48)),
    TenantLoad("mixed", 40, Lengths("uniform", 4, 300), Lengths("uniform", 16, 300)),
)


class Bench:
    """A running system with tenants, and their keys."""

    def __init__(self, system: System, keys: dict[str, str]) -> None:
        self.system = system
        self._keys = keys

    def run(self, loads: Sequence[TenantLoad], duration_s: float) -> dict[str, LoadRun]:
        """Load with all tenants at a time. Raises RuntimeError when a request failed."""
        with ThreadPoolExecutor(len(loads)) as threads:
            futures = {load.tenant: threads.submit(self._run_one, load, duration_s) for load in loads}
            return {tenant: future.result() for tenant, future in futures.items()}

    def _run_one(self, load: TenantLoad, duration_s: float) -> LoadRun:
        work = Workload(
            ENDPOINT,
            "chat",
            input_tokens=load.words,
            output_tokens=load.output,
            ignore_eos=True,
            seed=time.time_ns() % 1_000_000,
        )
        target = parse_target(self.system.url, ROUTE_PATHS["chat"], self._keys[load.tenant])
        run = run_load(target, work, LoadSpec(concurrency=load.concurrency, duration_s=duration_s))
        failed = [record for record in run.records if not record.is_ok]
        if failed:
            raise RuntimeError(f"{load.tenant}: {len(failed)} failed: {failed[0].error_detail}")
        return run

    def work(self) -> dict[str, Work]:
        """Return what each tenant got so far."""
        return {
            each.tenant: Work(each.work_s, each.prompt_tokens, each.output_tokens)
            for each in self.system.status().tenants
        }

    def work_in_window(self, loads: Sequence[TenantLoad], window_s: float) -> dict[str, Work]:
        """Load with all tenants and return what each got between ramp and end."""
        with ThreadPoolExecutor(1) as thread:
            # Long enough that every tenant has a backlog until the window's end.
            running = thread.submit(self.run, loads, RAMP_S + window_s + 0.5)
            time.sleep(RAMP_S)
            before = self.work()
            time.sleep(window_s)
            after = self.work()
            running.result()
        return {load.tenant: after[load.tenant].since(before[load.tenant]) for load in loads}


@contextmanager
def serve_tenants() -> Iterator[Bench]:
    """Serve one simulated replica to all tenants of this benchmark."""
    endpoint = simulated(STEP_MS, max_open=1024)
    endpoint["native"] = {"max_running": NUM_SLOTS}
    endpoint["simulated"]["prefill_ms_per_token"] = PREFILL_MS_PER_TOKEN
    names = ("light", "flood", *EQUAL, *WEIGHTS, "a", "b", "c", "d")
    keys = {name: f"hr-{secrets.token_urlsafe(24)}" for name in names}
    tenants = {
        name: {
            "keys": [f"sha256:{sha256(key.encode()).hexdigest()}"],
            "weight": WEIGHTS.get(name, 1.0),
        }
        for name, key in keys.items()
    }
    config = parse_config(
        {
            "endpoints": {ENDPOINT: endpoint},
            "gateway": {"bind": f"127.0.0.1:{free_port()}"},
            "tenants": tenants,
        }
    )
    with headrace.serve(config) as system:
        yield Bench(system, keys)


def run(*, is_quick: bool) -> Report:
    """Measure the light tenant's wait, shares, weights, and throughput beside first come, first served."""
    window_s = 6.0 if is_quick else 40.0
    rounds = 1 if is_quick else 3
    report = Report(
        "fairness",
        "A fair share for every tenant",
        f"One replica with the simulated engine: {NUM_SLOTS} requests at a time, {STEP_MS:g} ms per step and "
        f"{PREFILL_MS_PER_TOKEN:g} ms per prompt token. Tenants with keys of their own, through HAProxy; "
        "closed loops of streaming chat requests.",
    )
    with serve_tenants() as bench:
        bench.run([FLOOD_LOAD], 2.0)  # the engine's costs are measured from here on
        _measure_flood(bench, report, window_s, rounds)
        _measure_equal(bench, report, window_s)
        _measure_weights(bench, report, window_s)
        _measure_throughput(bench, report, window_s / 4, rounds)
    _measure_dispatcher(report, 4_000 if is_quick else 40_000)
    report.caveats += [
        "Client, gateway, front and engine share the machine's cores.",
        "The light tenant's prompts are long: its wait alone is mostly their computation. Under the flood a "
        "request waits for a slot, and for the few that were sent ahead to the engine.",
        "Work is charged as expected when a request is bound and corrected when it ends, tokens are counted "
        "when it ends: windows are blurred by one request per slot.",
    ]
    return report


def _measure_flood(bench: Bench, report: Report, window_s: float, rounds: int) -> None:
    alone: list[float] = []
    flooded: list[float] = []
    for _ in range(rounds):  # in turns, so that the machine's moods hit both
        alone += _waits_ms(bench.run([LIGHT_LOAD], RAMP_S + window_s)["light"])
        flooded += _waits_ms(bench.run([LIGHT_LOAD, FLOOD_LOAD], RAMP_S + window_s)["light"])
    rows = []
    for name, waits in (("alone", alone), ("under the flood", flooded)):
        mean = sum(waits) / len(waits)
        rows.append(
            [name, *(f"{value:.1f}" for value in (mean, _p(waits, 50), _p(waits, 99))), str(len(waits))]
        )
    report.tables.append(
        Table("Light tenant's time to first token, ms", ("", "mean", "p50", "p99", "n"), rows)
    )
    ratio = _p(flooded, 99) / _p(alone, 99)
    report.data["flood"] = {"alone_ms": alone, "flooded_ms": flooded}
    figure = f"light tenant's p99 TTFT ({LIGHT} at a time) under {FLOOD} of a flood, relative to alone"
    report.aims.append(Aim(figure, f"at most {AIM_TTFT}", f"{ratio:.2f}", ratio <= AIM_TTFT))


def _measure_equal(bench: Bench, report: Report, window_s: float) -> None:
    work = bench.work_in_window(EQUAL_LOADS, window_s)
    index = jain(each.charged_s for each in work.values())
    report.data["equal"] = {name: asdict(each) for name, each in work.items()}
    report.tables.append(_work_table("Equal tenants with a backlog, different requests", work, {}))
    figure = "Jain's index of equal tenants with a backlog, by work"
    report.aims.append(Aim(figure, f"at least {AIM_JAIN}", f"{index:.4f}", index >= AIM_JAIN))


def _measure_weights(bench: Bench, report: Report, window_s: float) -> None:
    loads = [
        TenantLoad(name, 70, Lengths("uniform", 4, 100), Lengths("uniform", 16, 128)) for name in WEIGHTS
    ]
    work = bench.work_in_window(loads, window_s)
    index = jain(work[name].charged_s / weight for name, weight in WEIGHTS.items())
    report.data["weighted"] = {name: asdict(each) for name, each in work.items()}
    report.tables.append(_work_table("Tenants with weights and a backlog", work, WEIGHTS))
    figure = "Jain's index of work per weight, weights 1 : 2 : 4"
    report.aims.append(Aim(figure, f"at least {AIM_JAIN}", f"{index:.4f}", index >= AIM_JAIN))


def _measure_throughput(bench: Bench, report: Report, window_s: float, rounds: int) -> None:
    """The same load from four tenants and from one, for which the queue is first come, first served."""
    words, output = Lengths("uniform", 4, 100), Lengths("uniform", 16, 128)
    fair_loads = [TenantLoad(name, 40, words, output) for name in "abcd"]
    one_load = [TenantLoad("a", 160, words, output)]
    totals = {"four tenants": 0.0, "one tenant": 0.0}
    for _ in range(2 * rounds):
        for name, loads in (("four tenants", fair_loads), ("one tenant", one_load)):
            work = bench.work_in_window(loads, window_s)
            totals[name] += sum(each.nominal_s for each in work.values())
    seconds = 2 * rounds * window_s
    ratio = totals["four tenants"] / totals["one tenant"]
    rows = [[name, f"{work_s / seconds:.4f}"] for name, work_s in totals.items()]
    report.tables.append(Table("Throughput: engine-seconds of work per second", ("160 at a time", ""), rows))
    report.data["throughput"] = {name: work_s / seconds for name, work_s in totals.items()}
    figure = "total throughput relative to first come, first served"
    report.aims.append(Aim(figure, f"at least {AIM_THROUGHPUT}", f"{ratio:.3f}", ratio >= AIM_THROUGHPUT))


def _measure_dispatcher(report: Report, num_requests: int) -> None:
    rows = []
    for num_tenants, num_held in ((1, 0), (1, 1000), (100, 1000), (10_000, 20_000)):
        rig = DispatcherRig(num_tenants, num_held)
        best = min(rig.cpu_us_per_request(num_requests // 4) for _ in range(4))
        rows.append([f"{num_tenants:,}", f"{num_held:,}", f"{best:.1f}"])
        report.data[f"dispatcher, {num_tenants} tenants, {num_held} held"] = best
        if num_tenants == 100:
            figure = "fair queue, limits, dispatcher: CPU per request, 100 tenants with limits, 1,000 held"
            report.aims.append(
                Aim(figure, f"at most {AIM_CPU_US:g} µs", f"{best:.1f} µs", best <= AIM_CPU_US)
            )
    headers = ("tenants", "held", "CPU µs per request")
    report.tables.append(
        Table(
            "Fair queue, limits, charges and dispatcher, without placement",
            headers,
            rows,
        )
    )


def jain(shares: Iterable[float]) -> float:
    """Return Jain's fairness index (Jain, Chiu, Hawe, DEC-TR-301, 1984): 1 is equal, 1/n is one takes all."""
    values = list(shares)
    return sum(values) ** 2 / (len(values) * sum(value**2 for value in values))


def _work_table(title: str, work: dict[str, Work], weights: dict[str, float]) -> Table:
    total_s = sum(each.charged_s for each in work.values())
    rows = [
        [
            name,
            f"{weights.get(name, 1.0):g}",
            f"{each.charged_s:.2f}",
            f"{each.charged_s / total_s:.1%}",
            f"{each.nominal_s:.2f}",
            f"{each.prompt_tokens:,}",
            f"{each.output_tokens:,}",
        ]
        for name, each in work.items()
    ]
    headers = ("tenant", "weight", "engine-seconds charged", "share", "by the settings", "tokens in", "out")
    return Table(title, headers, rows)


def _waits_ms(run: LoadRun) -> list[float]:
    """TTFT of the requests sent after the ramp."""
    start_s = min(record.sent_s for record in run.records) + RAMP_S
    return [1e3 * (each.token_times[0] - each.sent_s) for each in run.records if each.sent_s >= start_s]


def _p(values: Sequence[float], percent: int) -> float:
    return quantiles(values, n=100, method="inclusive")[percent - 1]
