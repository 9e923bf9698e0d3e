"""The comparison of engines: the same request bytes for all, forms of one model, turns, lives, ratios."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from array import array
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from benchmarks.engine import AIMS, Loads, Plan, _aims, _table
from benchmarks.engines import convert, running, tether
from benchmarks.engines.catalogue import EngineRig, PeerEngine, engines, on_request
from benchmarks.engines.company import Company, choose_engines
from benchmarks.engines.convert import write_huggingface, write_q8_0
from benchmarks.engines.load import Load, LoadFailed, workload_for
from benchmarks.engines.models import SMOLLM2, BenchModel
from benchmarks.engines.page import engines_table, failures_of
from benchmarks.engines.peaks import Peaks
from benchmarks.engines.running import EngineFailed, RunningEngine, running_peer
from benchmarks.peers.catalogue import ROOT, UnknownPeer
from benchmarks.prompts import Disturbance, Figures, PrefixTimes, _gaps
from benchmarks.prompts import _aims as prompt_aims
from benchmarks.roofline import _row as roofline_row
from benchmarks.roofline import highest
from tests.unit.engine.tiny_models import gguf_file
from tokenizers import Tokenizer, models

from headrace.bench.load import LoadRun, LoadSpec
from headrace.bench.record import RequestRecord
from headrace.bench.results import evaluate
from headrace.engine.model_files.metadata import read_metadata
from headrace.engine.model_files.resolve import ModelFiles
from headrace.engine.weights.names import expected_shapes
from headrace.engine.weights.source import open_weights

PEERS = [*engines(), *on_request()]


def fake_engine(name: str, url: str = "http://127.0.0.1:9/v1", **changes: object) -> RunningEngine:
    """An engine without processes."""
    engine = RunningEngine(
        name,
        name.title(),
        url,
        "chat",
        1.5,
        " Paris.\nIt `is`",
        find=lambda: [psutil.Process()],
        is_pausable=False,
    )
    for field, value in changes.items():
        setattr(engine, field, value)
    return engine


def load_of(tokens_per_s: float) -> Load:
    """A load of one request with 101 tokens."""
    record = RequestRecord(0, 0.0, is_done=True, end_s=101 / tokens_per_s, num_completion_tokens=101)
    record.token_times = array("d", [record.end_s * part / 101 for part in range(1, 102)])
    run = LoadRun(LoadSpec(concurrency=1, max_requests=1), [record], record.end_s, 0.0)
    return Load(evaluate(run), 0.5, 2**20)


def test_the_same_seed_asks_every_engine_for_the_same_and_only_names_differ() -> None:
    bodies = [
        json.loads(workload_for(engine, 128, 16, seed=3).body(1))
        for engine in (fake_engine("a"), fake_engine("b", served_name="/x", takes_ignore_eos=False))
    ]
    assert bodies[0]["prompt"] == bodies[1]["prompt"]
    assert bodies[0]["prompt"].count(" ") == 128
    assert bodies[0].pop("ignore_eos") is True
    assert {name for name in bodies[0] if bodies[0][name] != bodies[1].get(name)} == {"model"}


@pytest.mark.parametrize("peer", PEERS, ids=lambda peer: peer.name)
def test_every_engine_listens_on_loopback_with_the_threads_of_all(
    peer: PeerEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text('{"eos_token_id": 2}')
    (source / "model.safetensors").write_text("")
    for form in ("huggingface", "gguf", "q8_0"):
        monkeypatch.setattr(BenchModel, form, lambda _: source)
    rig = EngineRig(SMOLLM2, 7001, tmp_path, 512)
    variables = peer.variables(rig)
    words = " ".join([*peer.command(rig), *(f"{name}={value}" for name, value in variables.items())])
    assert "7001" in words
    assert "0.0.0.0" not in words
    assert "--host 127.0.0.1" in words or "llama_server.py" in words
    is_told_threads = "OMP_NUM_THREADS=2" in words or "--threads 2" in words
    assert is_told_threads == (peer.name != "vllm-threads")
    if not peer.takes_ignore_eos:
        config = json.loads((Path(peer.served_name(rig)) / "config.json").read_text())
        assert config == {"eos_token_id": None}


@pytest.mark.parametrize("environment", [*sorted({peer.environment for peer in PEERS}), "gemma3-270m"])
def test_every_package_of_an_engine_is_pinned(environment: str) -> None:
    path = ROOT / "benchmarks" / "peers" / f"requirements-{environment}.txt"
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    assert lines
    assert all(re.fullmatch(r"[\w.-]+==[\w.!]+", line) for line in lines)
    assert environment in (ROOT / "Makefile").read_text()


def test_an_unknown_engine_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UnknownPeer, match="no engine ollama; there are: vllm, llama-cpp, "):
        choose_engines(["ollama"])
    assert choose_engines(["none"]) == []
    assert [engine.name for engine in choose_engines([])] == [engine.name for engine in engines()]


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_the_forms_of_a_model_are_the_same_weights(
    architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The tiny file carries no tokenizer that could be built.
    monkeypatch.setattr(convert, "build_gguf_tokenizer", lambda *_: Tokenizer(models.BPE()))
    files = gguf_file(tmp_path / "tiny.gguf", architecture, "Q8_0")
    write_huggingface(files, tmp_path / "hf")
    write_q8_0(files.path, tmp_path / "q8.gguf")
    wanted = read_metadata(files).hyperparameters
    source = open_weights(files, wanted)
    forms = [
        (ModelFiles("hf", "huggingface", tmp_path / "hf"), 0.01),
        (ModelFiles("q8", "gguf", tmp_path / "q8.gguf"), 1e-6),
    ]
    for form, tolerance in forms:
        found = read_metadata(form)
        assert found.eos_token_ids == read_metadata(files).eos_token_ids
        for name in ("num_layers", "head_dim", "attention_scale", "sliding_window", "is_sliding_by_layer"):
            assert getattr(found.hyperparameters, name) == pytest.approx(getattr(wanted, name)), name
        copy = open_weights(form, found.hyperparameters)
        for name in expected_shapes(wanted):
            torch.testing.assert_close(
                copy.read(name, torch.float32),
                source.read(name, torch.float32),
                rtol=tolerance,
                atol=tolerance,
            )
    assert (tmp_path / "hf" / "tokenizer.json").is_file()


class Turns:
    """Counts turns; an engine may fail, die or be slow."""

    def __init__(self) -> None:
        self.order: list[str] = []

    def __call__(self, engine: RunningEngine, number: int) -> int:
        self.order.append(engine.name)
        if engine.name == "fails":
            raise LoadFailed("no")
        if engine.name == "slow":
            time.sleep(0.02)
        return number


def test_rounds_begin_with_another_engine_and_a_failure_ends_only_its_own_turns() -> None:
    together = Company([fake_engine("a"), fake_engine("fails"), fake_engine("once", max_rounds=1)])
    turns = Turns()
    figures = together.take_turns(3, "what", turns, limit_s=60.0)
    assert turns.order == ["a", "fails", "once", "a", "a"]
    assert figures == {"a": [0, 1, 2], "fails": [], "once": [0]}
    assert together.turns_failed == ["Fails, what: no"]
    assert [engine.name for engine in together.running] == ["a", "fails", "once"]


def test_a_slow_turn_is_not_repeated_and_a_dead_engine_leaves() -> None:
    together = Company([fake_engine("slow"), fake_engine("fails", find=list)])
    figures = together.take_turns(3, "what", Turns(), limit_s=0.01)
    assert figures["slow"] == [0]
    assert together.failures == {"fails": "it died"}
    assert [engine.name for engine in together.running] == ["slow"]


def test_aims_compare_medians_and_a_missing_peer_meets_none() -> None:
    together = Company([fake_engine("headrace"), fake_engine("vllm"), fake_engine("llama-cpp")])
    by_engine = {
        "headrace": [load_of(500), load_of(130), load_of(90)],
        "vllm": [load_of(30)],
        "llama-cpp": [load_of(110)],
    }
    loads = Loads(SMOLLM2, together, {1: by_engine})
    plan = Plan(AIMS, (1,), 3, 1.0)
    first, second = _aims(loads, plan, 4.0, 1.3)
    assert (first.measured, first.is_met) == ("130.0 is 4.33 times", True)
    assert (second.measured, second.is_met) == ("130.0 is 1.18 times", False)
    assert [row[2:4] for row in _table(loads, plan).rows] == [
        ["**130.0**", ""],
        ["30.0", "4.33"],
        ["110.0", "1.18"],
    ]
    del by_engine["vllm"]
    missing = _aims(loads, plan, 4.0, 1.3)[0]
    assert (missing.measured, missing.is_met) == ("not measured", False)


def test_who_failed_stands_in_the_report() -> None:
    together = Company([fake_engine("headrace")], {"vllm": "it died"}, ["a turn"])
    assert failures_of(SMOLLM2, together) == ["SmolLM2-135M, vllm: it died", "a turn"]
    [row] = engines_table(SMOLLM2, together).rows
    assert "`The capital of France is Paris.⏎It 'is'`" in row


def test_only_gaps_after_every_stream_began_count() -> None:
    records = [RequestRecord(number, 0.0, is_done=True) for number in range(2)]
    records[0].token_times = array("d", [1.0, 2.0, 3.0, 4.0])
    records[1].token_times = array("d", [2.0, 4.0])
    run = LoadRun(LoadSpec(concurrency=2, max_requests=2), records, 4.0, 0.0)
    assert sorted(_gaps(run)) == [(3.0, 1.0), (4.0, 1.0), (4.0, 2.0)]


def test_a_steps_share_is_of_the_floor_and_the_limits_are_the_best_measured() -> None:
    slow, fast = Peaks(2, 10e9, 900e9, "x"), Peaks(2, 20e9, 600e9, "x")
    peaks = highest([slow, fast])
    assert (peaks.read_bytes_per_s, peaks.int8_operations_per_s) == (20e9, 900e9)
    model = replace(SMOLLM2, num_weights=100_000_000)
    timed = {"path": "int8 x", "times_s": [0.011, 0.010, 0.5], "kv_bytes_per_token": 390_625}
    noisy = timed | {"times_s": [0.05]}
    row = roofline_row(model, 1, [noisy, timed], peaks)
    assert row["kv_bytes"] == 100_000_000
    assert row["memory_floor_s"] == pytest.approx(0.010)
    assert row["memory_share"] == pytest.approx(0.010 / 0.011)
    assert row["compute_floor_s"] == pytest.approx(200e6 / 900e9)
    assert roofline_row(model, 64, [timed], peaks)["share"] > 1  # arithmetic is the higher floor
    assert roofline_row(model, 1, [timed | {"path": "bfloat16 x"}], peaks)["weight_bytes"] == 200_000_000


def test_prompt_aims_are_of_headrace_and_compare_with_the_best_peer() -> None:
    figures = Figures(
        {"headrace": [1.0, 2.0, 4.0], "vllm": [4.0]},
        {"headrace": [Disturbance(5.0, 10.0, 12.0, 25.0, 40, 1.0)], "vllm": []},
        {"headrace": [PrefixTimes(1000.0, 50.0)], "vllm": []},
    )
    prefill, disturbance, prefix = prompt_aims(figures)
    assert (prefill.measured, prefill.is_met) == ("1000, 2.00 times the best peer's", True)
    assert (disturbance.measured, disturbance.is_met) == ("2.5 times", False)
    assert (prefix.measured, prefix.is_met) == ("5.0%", True)


def wait_for(condition: Callable[[], bool], what: str, limit_s: float = 20.0) -> None:
    until_s = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < until_s, f"{what} within {limit_s} s"
        time.sleep(0.01)


# A program that ignores the request to end and has a child in a session of its own.
STUBBORN = """
import pathlib, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
pathlib.Path(sys.argv[1]).write_text(str(child.pid))
time.sleep(600)
"""


@pytest.mark.slow
def test_nothing_outlives_the_holder_of_the_pipe_not_even_what_is_stopped(tmp_path: Path) -> None:
    program = Path(tether.__file__).read_text().replace("GRACE_S = 10.0", "GRACE_S = 0.3")
    (tmp_path / "tether.py").write_text(program)
    note = tmp_path / "pid"
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / "tether.py"), sys.executable, "-c", STUBBORN, str(note)],
        stdin=subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stdin is not None
    wait_for(lambda: note.is_file() and note.read_text() != "", "the child's pid")
    below = psutil.Process(process.pid).children(recursive=True)
    assert len(below) == 2
    wait_for(lambda: psutil.Process(process.pid).num_ctx_switches().voluntary > 2, "a look at the tree")
    for one in below:
        one.suspend()
    process.stdin.close()
    process.wait(20)
    gone = psutil.wait_procs(below, timeout=10)[0]
    assert len(gone) == 2


# An OpenAI server as small as it can be; or a program that ends at once.
SERVER = """
import http.server, json, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        self.rfile.read(int(self.headers["content-length"]))
        body = json.dumps({"choices": [{"text": " Paris"}]}).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *_): pass
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def tiny_peer(script: str) -> PeerEngine:
    return PeerEngine(
        *("tiny", "Tiny", "none", "none", "none"),
        lambda rig: [sys.executable, "-c", script, str(rig.port)],
        start_limit_s=20.0,
    )


@pytest.mark.slow
def test_a_peer_is_asked_until_it_answers_stopped_woken_and_ended() -> None:
    with running_peer(tiny_peer(SERVER), SMOLLM2, 512) as engine:
        assert engine.answer == " Paris"
        [process] = engine.find()
        engine.pause()
        wait_for(lambda: process.status() == psutil.STATUS_STOPPED, "a stop")
        engine.wake()
        wait_for(lambda: process.status() != psutil.STATUS_STOPPED, "a wake-up")
        assert engine.cpu_s() > 0
        assert engine.memory_bytes() > 2**20
        engine.pause()
    wait_for(lambda: not process.is_running(), "the end")


@pytest.mark.slow
def test_a_peer_that_ends_at_its_start_says_so_with_the_end_of_its_log() -> None:
    peer = tiny_peer("import sys; print('no such model'); sys.exit(3)")
    with pytest.raises(EngineFailed, match="ended with 3: no such model"), running_peer(peer, SMOLLM2, 512):
        pass


def test_a_peer_never_sees_our_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/ours")
    assert "PYTHONPATH" not in running._clean_environment()
    assert os.environ["PYTHONPATH"] == "/ours"
