"""`python -m benchmarks [NAME …]`: run benchmarks, write benchmarks/reports/YYYY-MM-DD-NAME.md and .json."""

from __future__ import annotations

import argparse
import importlib
import signal
import sys

from benchmarks.namespaces import run_in_namespaces
from benchmarks.peers.catalogue import UnknownPeer
from benchmarks.report import Skipped

NAMES = (
    *("gateway", "tokens", "peers", "router", "placement", "fairness", "held"),
    *("engine", "roofline", "prompts", "overhead", "speculation", "structured", "start", "memory"),
    *("parallel", "zero", "survive", "autoscaling", "simulation", "vllm", "durable"),
    *("fleet", "cluster"),
)
IN_NAMESPACES = ("fleet", "cluster")
"""Those that start a Ray cluster."""
WITH_PEERS = ("peers", "engine", "prompts")
"""Those that `--only` says the peers of."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"all (the default), or of: {', '.join(NAMES)}"
    )
    parser.add_argument("--quick", action="store_true", help="short and rough: to see that it runs")
    parser.add_argument("--only", default="", metavar="PEER,…", help="measure beside these peers alone")
    parser.add_argument("--no-report", action="store_true", help="print, and write no file")
    arguments = parser.parse_args()
    names = list(NAMES) if arguments.names in ([], ["all"]) else arguments.names
    unknown = [name for name in names if name not in NAMES]
    if unknown:
        parser.error(f"no benchmark {', '.join(unknown)}; there are: {', '.join(NAMES)}, all")
    only = [peer for peer in arguments.only.split(",") if peer]
    if only and (len(names) != 1 or names[0] not in WITH_PEERS):
        parser.error(f"--only belongs to {' or '.join(WITH_PEERS)} alone: NAME --only PEER,…")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that whatever was started is ended
    failed = 0
    for name in names:
        options = {"only": only} if only else {}
        if name in IN_NAMESPACES:
            flags = ["--quick"] * arguments.quick + ["--no-report"] * arguments.no_report
            code = run_in_namespaces([name, *flags])
            if code is not None:
                failed = failed or code
                continue
        print(f"== {name}", file=sys.stderr, flush=True)
        try:
            report = importlib.import_module(f"benchmarks.{name}").run(is_quick=arguments.quick, **options)
        except Skipped as reason:
            print(f"{name}: skipped: {reason}", file=sys.stderr)
            continue
        except UnknownPeer as error:
            parser.error(str(error))
        print(report.to_markdown())
        if not arguments.no_report:
            for path in report.write():
                print(f"wrote {path}", file=sys.stderr)
    return failed


if __name__ == "__main__":
    raise SystemExit(main())
