"""Runs llama.cpp's own server out of the `xllamacpp` package. Started with that environment's Python.

Must not import headrace: it is not installed there.
"""

from __future__ import annotations

import argparse
import signal

import xllamacpp


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--slots", type=int, required=True, help="answers computed together")
    parser.add_argument("--context", type=int, required=True, help="most tokens of each slot")
    arguments = parser.parse_args()
    signals = {signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)  # before its threads begin: they must not take them
    server = xllamacpp.Server(_parameters(arguments))
    print(xllamacpp.get_system_info(), server.listening_address, flush=True)
    signal.sigwait(signals)
    return 0


def _parameters(arguments: argparse.Namespace) -> xllamacpp.CommonParams:
    parameters = xllamacpp.CommonParams()
    parameters.model.path = arguments.model
    parameters.hostnames = ["127.0.0.1"]
    parameters.port = arguments.port
    # A slot per answer that may run: with fewer, answers wait for each other.
    parameters.n_parallel = arguments.slots
    parameters.n_ctx = arguments.slots * arguments.context
    parameters.cpuparams.n_threads = arguments.threads
    parameters.cpuparams_batch.n_threads = arguments.threads
    parameters.ui = False
    parameters.verbosity = 1
    return parameters


if __name__ == "__main__":
    raise SystemExit(main())
