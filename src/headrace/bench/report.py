"""A bench report for people (tables) and for programs (JSON).

Owns the presentation. Must not know how figures are measured.
"""

from __future__ import annotations

import msgspec
from rich import box
from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from headrace.bench.results import BenchReport, RunResult
from headrace.bench.statistics import Summary


def to_json(report: BenchReport) -> bytes:
    """Return the report as indented JSON with a newline at the end."""
    return msgspec.json.format(msgspec.json.encode(report), indent=2) + b"\n"


def print_report(report: BenchReport, console: Console) -> None:
    """Print the report's head and one block per run, and a comparison when there are several."""
    console.print(
        f"[bold]{escape(report.model)}[/] at {escape(report.url)}, {report.endpoint}, "
        f"{report.input_tokens} tokens in, {report.output_tokens} out"
        + (" (end of text ignored)" if report.ignore_eos else ""),
        highlight=False,
    )
    for run in report.runs:
        console.print(render_run(run))
    if len(report.runs) > 1:
        console.print(render_comparison(report.runs))


def render_run(run: RunResult) -> RenderableType:
    """Return one run as a table of latencies with its totals around it."""
    table = Table(title=_title(run), title_justify="left", title_style="bold")
    table.add_column("ms")
    for name in ("mean", "p50", "p90", "p99", "max"):
        table.add_column(name, justify="right")
    rows = (
        ("TTFT", run.ttft_ms),
        ("ITL", run.itl_ms),
        ("TPOT", run.tpot_ms),
        ("end to end", run.end_to_end_ms),
    )
    for name, summary in rows:
        table.add_row(name, *_cells(summary))
    if run.mode == "open":
        table.add_row("send lag", *_cells(run.send_lag_ms), style="dim")
    lines = [
        f"{run.num_ok} of {run.num_requests} requests in {run.elapsed_s:.1f} s: "
        f"{run.requests_per_s:.2f} requests/s, {run.output_tokens_per_s:,.1f} output tokens/s, "
        f"{run.input_tokens_per_s:,.1f} input tokens/s ({_describe_source(run)})"
    ]
    if run.cached_tokens:
        lines.append(
            f"{run.cached_tokens:,} of {run.input_tokens:,} input tokens came from the prefix cache"
            " (prompts of an earlier run? choose another --seed)"
        )
    if run.goodput_per_s is not None and run.goodput_ratio is not None:
        lines.append(f"goodput {run.goodput_per_s:.2f} requests/s ({run.goodput_ratio:.1%} met the SLO)")
    lines.append(
        f"client: {run.client_cpu_ratio:.0%} of one core, {run.client_cpu_us_per_chunk:.1f} µs per chunk"
    )
    parts: list[RenderableType] = [table, Text("\n".join(lines))]
    for kind, count in run.errors.items():
        parts.append(Text(f"{count} failed, {kind}: {run.error_examples[kind]}", style="red"))
    parts += [Text(f"INVALID: {reason}", style="bold red") for reason in run.invalid_reasons]
    return Group(*parts)


def render_comparison(runs: list[RunResult]) -> Table:
    """Return one line per run of a closed loop."""
    # Narrow enough for 80 columns: a wrapped figure cannot be read.
    table = Table(title="all runs", title_justify="left", title_style="bold", box=box.SIMPLE, padding=0)
    for name in ("at a time", "tokens/s", "req/s", "TTFT p50", "TTFT p99", "TPOT p50", "failed", "valid"):
        table.add_column(name, justify="right", no_wrap=True)
    for run in runs:
        table.add_row(
            str(run.concurrency),
            f"{run.output_tokens_per_s:,.1f}",
            f"{run.requests_per_s:.2f}",
            _number(run.ttft_ms.p50 if run.ttft_ms else None),
            _number(run.ttft_ms.p99 if run.ttft_ms else None),
            _number(run.tpot_ms.p50 if run.tpot_ms else None),
            str(run.num_failed),
            "yes" if run.is_valid else "NO",
        )
    return table


def _title(run: RunResult) -> str:
    return f"{run.mode} loop, {_load(run)}"


def _load(run: RunResult) -> str:
    if run.mode == "closed":
        return f"{run.concurrency} at a time"
    return f"{run.rate:g} requests/s ({run.arrivals})"


def _describe_source(run: RunResult) -> str:
    if run.tokens_from == "usage":
        return "tokens as the server counted them"
    if run.tokens_from == "chunks":
        return "tokens counted as chunks: the server gave no usage, input tokens are unknown"
    return "tokens as the server counted them where it did, else chunks"


def _cells(summary: Summary | None) -> list[str]:
    if summary is None:
        return ["-"] * 5
    return [_number(value) for value in (summary.mean, summary.p50, summary.p90, summary.p99, summary.max)]


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if abs(value) < 100 else f"{value:,.0f}"
