"""Real traces as what arrives per second: requests, prompt tokens, output tokens.

Reads the folder that HEADRACE_TRACES names: Azure's code trace (Splitwise, ISCA 2024) and ServeGen's clients
(rates, distributions and lengths of ten-minute windows). Must not know policies or fleets.
"""

from __future__ import annotations

import gzip
import os
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.report import Skipped

VARIABLE = "HEADRACE_TRACES"
WINDOW_S = 600
DAY_S = 86_400
MODEL = "m-large"
INPUT_CV, OUTPUT_CV = 1.5, 1.0
"""Spread of a client's lengths around its mean, of which the trace tells quantiles for some clients only."""
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Trace:
    """What arrives in each second."""

    name: str
    requests: Floats
    prompt_tokens: Floats
    output_tokens: Floats

    @property
    def num_seconds(self) -> int:
        return len(self.requests)

    @property
    def mean_prompt(self) -> float:
        return float(self.prompt_tokens.sum() / self.requests.sum())

    @property
    def mean_output(self) -> float:
        return float(self.output_tokens.sum() / self.requests.sum())


def folder() -> Path:
    """Return the traces' folder. Raises Skipped."""
    path = os.environ.get(VARIABLE, "")
    if not path or not Path(path).is_dir():
        raise Skipped(f"{VARIABLE} names no folder with traces (azure2023_code.csv.gz, servegen_*.parquet)")
    return Path(path)


def azure_code(path: Path, times: int = 1) -> Trace:
    """Read Azure's code trace of 2023; `times`: each request so often."""
    file = path / "azure2023_code.csv.gz"
    if not file.exists():
        raise Skipped(f"{file} is not there")
    with gzip.open(file, "rt") as lines:
        rows = np.loadtxt(lines, delimiter=",", skiprows=1)
    seconds = rows[:, 0].astype(int)
    size = int(seconds.max()) + 1

    def per_second(weights: Floats | None) -> Floats:
        return times * np.bincount(seconds, weights=weights, minlength=size).astype(float)

    return Trace("Azure code 2023", per_second(None), per_second(rows[:, 1]), per_second(rows[:, 2]))


def servegen(path: Path, num_days: float, seed: int = 5) -> Trace:
    """Draw ServeGen's requests to its large model. In each window each client has as many as counted, apart
    by the distribution fitted to it; lengths spread around the client's means."""
    columns = ("client", "t", "rate", "dist", "p1")
    rates = _columns(path / "servegen_client_rates.parquet", columns)
    rows = rates[:, rates[1] < num_days * DAY_S]
    means = _mean_lengths(path / "servegen_client_mean_lengths.parquet")
    random = np.random.default_rng(seed)
    size = int(num_days * DAY_S)
    requests, prompts, outputs = np.zeros(size), np.zeros(size), np.zeros(size)
    spread_in, spread_out = np.zeros(size), np.zeros(size)
    for client, start, rate, dist, shape in rows.T:
        count = round(rate * WINDOW_S)
        if count == 0:
            continue
        seconds = _arrivals(random, count, chr(int(dist)), shape)
        here = np.bincount(seconds, minlength=WINDOW_S).astype(float)
        span = slice(int(start), min(size, int(start) + WINDOW_S))
        here = here[: span.stop - span.start]
        mean_in, mean_out = means.get(int(client), means[-1])
        requests[span] += here
        prompts[span] += here * mean_in
        outputs[span] += here * mean_out
        spread_in[span] += here * (INPUT_CV * mean_in) ** 2
        spread_out[span] += here * (OUTPUT_CV * mean_out) ** 2
    prompts = _spread(random, prompts, spread_in)
    return Trace(f"ServeGen {MODEL}", requests, prompts, _spread(random, outputs, spread_out))


def _arrivals(random: np.random.Generator, count: int, dist: str, shape: float) -> NDArray[np.int64]:
    """Return the second of each arrival of a window."""
    if not 0.02 <= shape <= 50:
        gaps = random.standard_exponential(count + 1)
    elif dist == "W":
        gaps = random.weibull(shape, count + 1)
    else:
        gaps = random.standard_gamma(shape, count + 1)
    times = np.cumsum(gaps)
    total = times[-1]
    if not total > 0:
        return random.integers(0, WINDOW_S, count)
    seconds: NDArray[np.int64] = (times[:-1] * (WINDOW_S / total)).astype(np.int64)
    return np.minimum(seconds, WINDOW_S - 1)


def _spread(random: np.random.Generator, mean: Floats, variance: Floats) -> Floats:
    """Return gamma-distributed sums of such means and variances."""
    is_some = mean > 0
    out = np.zeros_like(mean)
    shape = mean[is_some] ** 2 / variance[is_some]
    out[is_some] = random.standard_gamma(shape) * (variance[is_some] / mean[is_some])
    return out


def _mean_lengths(path: Path) -> dict[int, tuple[float, float]]:
    """Return mean prompt and output tokens by client; of all, by rate, under -1."""
    client, rate, mean_in, mean_out = _columns(path, ("client", "rate", "in_mean", "out_mean"))
    is_known = np.isfinite(mean_in) & np.isfinite(mean_out) & (rate > 0)
    client, rate = client[is_known], rate[is_known]
    mean_in, mean_out = mean_in[is_known], mean_out[is_known]
    means = {-1: (float(np.average(mean_in, weights=rate)), float(np.average(mean_out, weights=rate)))}
    for number in np.unique(client):
        own = client == number
        weights = rate[own]
        means[int(number)] = (
            float(np.average(mean_in[own], weights=weights)),
            float(np.average(mean_out[own], weights=weights)),
        )
    return means


def _columns(path: Path, names: tuple[str, ...]) -> Floats:
    """Return columns of the rows of MODEL. Raises Skipped without the file or pyarrow."""
    if not path.exists():
        raise Skipped(f"{path} is not there")
    python = sys.executable if find_spec("pyarrow") is not None else ".peers/traces/bin/python"
    if not Path(python).exists():
        raise Skipped("pyarrow reads ServeGen's traces; install it with: make peers PEERS=traces")
    program = Path(__file__).with_name("parquet_columns.py")
    done = subprocess.run(
        [python, str(program), str(path), MODEL, *names], stdout=subprocess.PIPE, timeout=120, check=True
    )
    values = np.frombuffer(done.stdout, dtype=np.float64)
    count = int(values[0])
    return values[1:].reshape(len(names), count)
