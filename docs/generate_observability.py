"""Writes docs/reference/metrics.md and request-log.md from the code that exports metrics and log lines.

Run by `make docs`; a test fails when pages and code differ.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import get_type_hints

import msgspec
from prometheus_client.core import Metric

from headrace.api.messages import Demand
from headrace.observability.front_metrics import FrontMetrics
from headrace.observability.request_record import RequestRecord
from headrace.observability.request_statistics import MAX_TENANTS, OTHER, RequestStatistics
from headrace.observability.router_metrics import RouterCollector, RouterSnapshot

REFERENCE = Path(__file__).parent / "reference"
METRICS_PAGE = REFERENCE / "metrics.md"
REQUEST_LOG_PAGE = REFERENCE / "request-log.md"
METRICS_HEAD = f"""# Metrics

Written from the code by `make docs`; do not edit. All are in Prometheus' text format.

- **Router**: `/metrics` on `gateway.metrics_bind`; of several gateways each has the next port, and counts its
  own requests. HAProxy's own exporter is there, too, at `/metrics/haproxy`.
- **Front**: `/metrics` on each replica's address (`headrace status` shows it).

Names are those of the field, after `headrace_`: what vLLM calls `time_to_first_token_seconds`,
`e2e_request_latency_seconds`, `request_queue_time_seconds`, `prompt_tokens_total`, `generation_tokens_total`
is called so here. The router's durations begin when the gateway gets the request, the front's when the
replica does. `tenant` takes at most {MAX_TENANTS} values, and `{OTHER}` beyond; it is empty without tenants.
Counters end with `_total`; histograms have `_bucket`, `_sum` and `_count`.
"""
REQUEST_LOG_HEAD = """# The request log

Written from the code by `make docs`; do not edit.

Each gateway writes one line of JSON per ended request to `logs/requests-GATEWAY.jsonl` in the run directory
(`headrace status` shows it), whatever its end was: served, refused by the router, refused by HAProxy (401,
404, 413, ...), aborted. The file has mode 0600, and is renamed to `requests-GATEWAY.jsonl.1` at 64 MiB. There
is never a prompt, an answer or a key in it.

Router, HAProxy and front each know a part; a line waits up to 2 s for a missing one and is then written with
`null` there. Lines of requests that ended while the router was away may be missing or incomplete.
"""


def render_metrics() -> str:
    """Return docs/reference/metrics.md."""
    snapshot = RouterSnapshot(Demand("g1", 1, [], []), {}, RequestStatistics())
    router = RouterCollector(lambda: snapshot).collect()
    front = FrontMetrics("chat", "chat-1").collect()
    return "\n".join([METRICS_HEAD, _table("Router", router), _table("Front", front)])


def _table(title: str, families: Iterable[Metric]) -> str:
    rows = [f"## {title}\n", "| metric | type | labels | meaning |", "|---|---|---|---|"]
    for family in families:
        suffix = "_total" if family.type == "counter" else ""
        labels = ", ".join(f"`{label}`" for label in getattr(family, "_labelnames", ()))
        rows.append(f"| `{family.name}{suffix}` | {family.type} | {labels} | {family.documentation} |")
    return "\n".join(rows) + "\n"


def render_request_log() -> str:
    """Return docs/reference/request-log.md."""
    rows = ["| field | type | meaning |", "|---|---|---|"]
    kinds = {str: "text", int: "whole number", float: "number"}
    hints = get_type_hints(RequestRecord)
    described = get_type_hints(RequestRecord, include_extras=True)
    for name in RequestRecord.__struct_fields__:
        options = getattr(hints[name], "__args__", (hints[name],))
        kind = " or ".join(kinds.get(option, "null") for option in options)
        [meta] = [entry for entry in described[name].__metadata__ if isinstance(entry, msgspec.Meta)]
        rows.append(f"| `{name}` | {kind} | {meta.description} |")
    return REQUEST_LOG_HEAD + "\n" + "\n".join(rows) + "\n"


if __name__ == "__main__":
    METRICS_PAGE.write_text(render_metrics())
    REQUEST_LOG_PAGE.write_text(render_request_log())
