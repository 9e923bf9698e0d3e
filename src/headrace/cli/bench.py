"""`headrace bench`: load any OpenAI server and report latencies and throughput.

Owns the arguments and the progress display. Must not know how load is made (`headrace.bench` does).
Alone: `python -m headrace.cli.bench`.
"""

from __future__ import annotations

import math
import os
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.live import Live
from rich.text import Text

from headrace.bench.load import LoadSpec, Progress
from headrace.bench.report import print_report, to_json
from headrace.bench.results import BenchReport, Slo
from headrace.bench.suite import make_specs, parse_concurrency, run_suite
from headrace.bench.target import Target, choose_model, find_api_key, parse_target
from headrace.bench.workload import ROUTE_PATHS, Workload, WorkloadError, parse_lengths
from headrace.clock import SystemClock
from headrace.errors import HeadraceError

EXIT_NOT_VALID = 1
EXIT_MISTAKE = 2
EXIT_INTERRUPTED = 130


# One parameter per option: that is how typer declares a command line.
def bench(
    url: Annotated[str, typer.Option(help="Base URL of an OpenAI server.")] = "http://127.0.0.1:8000/v1",
    model: Annotated[str, typer.Option(help="Model name; needed when the server has several.")] = "",
    endpoint: Annotated[Literal["chat", "completions"], typer.Option(help="Which route.")] = "chat",
    concurrency: Annotated[
        str, typer.Option(help="Closed loop: requests at a time; a list makes several runs: 1,4,16.")
    ] = "",
    rate: Annotated[
        float, typer.Option(help="Open loop: requests per second, sent whatever comes back.")
    ] = 0,
    arrivals: Annotated[Literal["poisson", "fixed"], typer.Option(help="Gaps of the open loop.")] = "poisson",
    requests: Annotated[int | None, typer.Option(min=1, help="Measured requests per run.")] = None,
    duration: Annotated[float | None, typer.Option(help="Seconds for which requests are sent.")] = None,
    warmup: Annotated[int | None, typer.Option(min=0, help="Requests before, not measured.")] = None,
    timeout: Annotated[float, typer.Option(help="Longest time for one request, in seconds.")] = 300.0,
    input_tokens: Annotated[
        str, typer.Option(help="Prompt length: 128, 64-256, normal:MEAN,DEVIATION or exponential:MEAN.")
    ] = "128",
    output_tokens: Annotated[
        str, typer.Option(help="Answer length (max_tokens), written like above.")
    ] = "128",
    shared_prefix_tokens: Annotated[
        int, typer.Option(min=0, help="Tokens that all prompts begin with, for a prefix cache to find.")
    ] = 0,
    ignore_eos: Annotated[bool, typer.Option(help="Ask for answers of exactly the given length.")] = False,
    temperature: Annotated[float, typer.Option(min=0, help="Sampling temperature.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of prompts, lengths and arrivals.")] = 0,
    slo_ttft_ms: Annotated[float | None, typer.Option(min=0, help="Goodput: longest TTFT.")] = None,
    slo_itl_ms: Annotated[
        float | None, typer.Option(min=0, help="Goodput: longest ITL, for 99% of a request's gaps.")
    ] = None,
    json_path: Annotated[
        str, typer.Option("--json", help="Write the report as JSON here; - is stdout.")
    ] = "",
) -> None:
    """Load any OpenAI server, closed or open loop, and report latencies, tokens per second and goodput.

    The API key is read from HEADRACE_API_KEY or OPENAI_API_KEY.
    """
    console = Console(stderr=json_path == "-")
    try:
        base = _base_spec(concurrency, rate, arrivals, duration, timeout)
        specs = make_specs(base, parse_concurrency(concurrency or "1") if not rate else [], requests, warmup)
        target = parse_target(url, ROUTE_PATHS[endpoint], find_api_key(os.environ))
        workload = Workload(
            model=choose_model(target.url, model, target.headers),
            route=endpoint,
            input_tokens=parse_lengths(input_tokens),
            output_tokens=parse_lengths(output_tokens),
            shared_prefix_tokens=shared_prefix_tokens,
            ignore_eos=ignore_eos,
            temperature=temperature,
            seed=seed,
        )
        report = _run(target, workload, specs, Slo(slo_ttft_ms, slo_itl_ms))
    except HeadraceError as error:
        Console(stderr=True).print(str(error), style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(EXIT_MISTAKE) from None
    except KeyboardInterrupt:
        Console(stderr=True).print("Stopped; nothing is reported of a run that did not end.")
        raise typer.Exit(EXIT_INTERRUPTED) from None
    _write(report, json_path)
    print_report(report, console)
    if not all(run.is_valid for run in report.runs):
        raise typer.Exit(EXIT_NOT_VALID)


def _base_spec(
    concurrency: str,
    rate: float,
    arrivals: Literal["poisson", "fixed"],
    duration: float | None,
    timeout: float,
) -> LoadSpec:
    """Check what typer cannot. Raises WorkloadError."""
    if rate and concurrency:
        raise WorkloadError("--rate (open loop) and --concurrency (closed loop) exclude each other")
    if not math.isfinite(rate) or rate < 0 or rate > 100_000:
        raise WorkloadError(f"--rate is {rate:g}; it must be from above 0 to 100,000 requests per second")
    if duration is not None and not 0 < duration <= 86_400:
        raise WorkloadError(f"--duration is {duration:g}; it must be from above 0 to 86,400 seconds")
    if not 0 < timeout <= 86_400:
        raise WorkloadError(f"--timeout is {timeout:g}; it must be from above 0 to 86,400 seconds")
    return LoadSpec(
        concurrency=0 if rate else 1,
        rate=rate,
        arrivals=arrivals,
        max_requests=None if duration else 1,
        duration_s=duration,
        timeout_s=timeout,
    )


def _run(target: Target, workload: Workload, specs: list[LoadSpec], slo: Slo) -> BenchReport:
    console = Console(stderr=True)
    display = _Display(len(specs))
    live: AbstractContextManager[object] = nullcontext()
    if console.is_terminal:
        live = Live(console=console, get_renderable=display.render, refresh_per_second=4, transient=True)
    with live:
        return run_suite(target, workload, specs, slo, watch=display.watch)


class _Display:
    """The progress line; read by the display's thread."""

    def __init__(self, num_runs: int) -> None:
        self._num_runs = num_runs
        self._run = 0
        self._spec: LoadSpec | None = None
        self._progress = Progress()
        self._now_s = SystemClock().now_s

    def watch(self, spec: LoadSpec, progress: Progress) -> None:
        self._spec, self._progress = spec, progress
        self._run += 1

    def render(self) -> Text:
        spec, progress = self._spec, self._progress
        if spec is None:
            return Text("starting")
        load = f"{spec.concurrency} at a time" if spec.concurrency else f"{spec.rate:g} requests/s"
        parts = [f"run {self._run} of {self._num_runs}: {load}", progress.phase]
        wanted = "" if progress.num_wanted is None else f" of {progress.num_wanted}"
        parts.append(f"{progress.num_ended}{wanted} requests, {progress.num_sent - progress.num_ended} open")
        elapsed_s = self._now_s() - progress.start_s
        if progress.phase == "measuring" and elapsed_s > 0:
            parts.append(f"{elapsed_s:.0f} s, {progress.num_tokens / elapsed_s:,.0f} tokens/s")
        if progress.num_failed:
            parts.append(f"{progress.num_failed} failed")
        return Text(" · ".join(parts), no_wrap=True, overflow="ellipsis")


def _write(report: BenchReport, json_path: str) -> None:
    if not json_path:
        return
    data = to_json(report)
    if json_path == "-":
        sys.stdout.write(data.decode())
        return
    try:
        Path(json_path).write_bytes(data)
    except OSError as error:
        # The run is over: its table is still shown, so this is no reason to stop.
        Console(stderr=True).print(
            f"--json {json_path}: cannot be written: {error}", style="red", markup=False
        )


if __name__ == "__main__":
    typer.run(bench)
