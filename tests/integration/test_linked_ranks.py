"""Engines whose other rank is on another host: an address of its own on loopback, behind a tunnel.

The ranks share no memory; what they say to each other goes over TCP.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest
from tests.integration.test_engine_process import start_engine
from tests.integration.test_placed_ranks import holder_at, rank_of, tokens_of
from tests.integration.test_tensor_parallel import (
    engine_of,
    failure,
    generate,
    is_gone,
    settle,
    smollm2,
    tiny_spec,
)
from tests.unit.engine.tiny_models import huggingface_directory

from headrace.api.messages import EngineSpec, GenerationRequest, SamplingParams, Submit
from headrace.clock import SystemClock
from headrace.engine.model_files.resolve import ModelFiles, resolve_model
from headrace.engine.native import NativeEngine
from headrace.engine.workers.group import WorkerGroup
from headrace.engine.workers.parallel_runner import load_any_runner
from headrace.engine.workers.placed import Lobby
from headrace.errors import EngineDead, ModelError
from headrace.fabric.cluster_identity import make_secret, write_identity
from headrace.fabric.tunnel import TunnelHost

# Each rank imports torch.
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("library")]
HERE, THERE = "127.0.0.1", "127.0.0.2"
LIMIT_S = 30.0


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    return huggingface_directory(tmp_path_factory.mktemp("tiny"))


class TwoHosts:
    """What the holder's host reaches of the engine's, in a thread of its own. `path` is there, `far_path` is
    what the holder sees of it."""

    def __init__(self, directory: Path) -> None:
        self.path, self.far_path = directory / "ranks.sock", directory / "far.sock"
        identity = directory / "cluster.pem"
        write_identity(make_secret(), identity)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        self._here, self._there = TunnelHost(identity), TunnelHost(identity)
        self._address = self._run(self._here.start(HERE))
        self._here.offer("ranks", str(self.path))
        self.join()

    def join(self) -> None:
        self._run(self._there.reach("ranks", str(self.far_path), self._address))

    def cut(self) -> None:
        """The holder's connection to the engine ends, as with the keeper that carried it."""
        self._loop.call_soon_threadsafe(self._there.forget, "ranks")
        settle(lambda: not self.far_path.exists(), "the tunnel is there")

    def close(self) -> None:
        for host in (self._there, self._here):
            self._run(host.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(LIMIT_S)
        self._loop.close()

    def _run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(LIMIT_S)


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[TwoHosts]:
    hosts = TwoHosts(tmp_path)
    yield hosts
    hosts.close()


def linked(files: ModelFiles, hosts: TwoHosts, **settings: object) -> EngineSpec:
    return tiny_spec(files, rank_socket=str(hosts.path), rank_address=HERE, **settings)


def group_at(spec: EngineSpec, hosts: TwoHosts, limit_s: float = 20.0) -> WorkerGroup:
    with Lobby(str(hosts.path), HERE, [1]) as lobby:
        return WorkerGroup(spec, lobby.start_rank, limit_s)


def load(spec: EngineSpec, group: WorkerGroup) -> NativeEngine:
    runner = load_any_runner(spec, resolve_model(spec.model), lambda _phase: None, group)
    return NativeEngine(spec, runner, SystemClock())


def is_connected_to(process: psutil.Process, host: str) -> bool:
    return any(each.raddr and each.raddr.ip == host for each in process.net_connections("tcp4"))


def within(limit_s: float, act: Callable[[], object]) -> None:
    began_s = time.monotonic()
    act()
    assert time.monotonic() - began_s < limit_s


def test_ranks_on_two_hosts_give_the_bits_of_one_process_also_after_sleep(
    hosts: TwoHosts, tmp_path: Path
) -> None:
    shared = list(range(2000, 2060))
    prompts = {f"r{i}": shared + [504, 3575, 282, 7158, 314 + i] * (4 + i) for i in range(2)}
    alone, _ = engine_of(smollm2(1, tmp_path / "packed"))
    expected = generate(alone, prompts)
    spec = smollm2(2, tmp_path / "packed")
    with holder_at(hosts.far_path, THERE) as holder:
        group = group_at(spec, hosts)
        engine = load(spec, group)
        assert engine.describe().path.endswith(", 1 thread in each of 2 ranks over TCP")
        assert is_connected_to(rank_of(holder), HERE)
        assert generate(engine, prompts) == expected
        engine.sleep(2)
        engine.wake()
        assert generate(engine, {"r0": prompts["r0"]})["r0"] == expected["r0"]
        rank = rank_of(holder)
        group.close()
        settle(lambda: is_gone(rank), "the rank lives on")


def test_a_rank_elsewhere_that_is_killed_ends_the_engine_at_once_and_says_so(
    tiny: ModelFiles, hosts: TwoHosts
) -> None:
    with holder_at(hosts.far_path, THERE) as holder, start_engine(linked(tiny, hosts)) as engine:
        engine.wait_ready()
        rank = rank_of(holder)
        engine.send(Submit(GenerationRequest("r", [5, 6], SamplingParams(max_tokens=250, ignore_eos=True))))
        engine.outputs_until(lambda outputs: len(outputs) > 5)
        rank.kill()
        failed = failure(engine)
    assert failed.retryable
    assert f"rank 1 was lost: pid {rank.pid} ended with signal 9" in failed.error


def test_a_cut_tunnel_disturbs_no_engine_and_the_next_one_comes_through_it_and_ends_a_hung_rank(
    tiny: ModelFiles, hosts: TwoHosts
) -> None:
    with holder_at(hosts.far_path, THERE) as holder:
        with start_engine(linked(tiny, hosts)) as engine:
            engine.wait_ready()
            rank = rank_of(holder)
            hosts.cut()
            expected = tokens_of(engine)
            rank.suspend()
            engine.process.kill()
        hosts.join()
        with start_engine(linked(tiny, hosts)) as engine:
            engine.wait_ready()
            assert is_gone(rank)
            assert tokens_of(engine) == expected


def test_a_rank_elsewhere_that_hangs_ends_the_step_within_the_limit(
    tiny: ModelFiles, hosts: TwoHosts
) -> None:
    spec = linked(tiny, hosts)
    with holder_at(hosts.far_path, THERE) as holder:
        group = group_at(spec, hosts, limit_s=3.0)
        engine = load(spec, group)
        engine.compute_first_step()
        rank = rank_of(holder)
        rank.suspend()
        engine.submit(GenerationRequest("r", [5, 6], SamplingParams(max_tokens=5)))
        with pytest.raises(EngineDead, match=r"rank 1 has not come within 3 s: it hangs"):
            within(10, engine.step)
        group.close()
        settle(lambda: is_gone(rank), "the rank lives on")


def test_a_rank_that_cannot_read_the_model_says_so_before_anybody_waits_for_it(
    tiny: ModelFiles, hosts: TwoHosts, tmp_path: Path
) -> None:
    with holder_at(hosts.far_path, THERE):
        absent = msgspec.structs.replace(tiny_spec(tiny), model=str(tmp_path / "absent"))
        group = group_at(absent, hosts)
        with pytest.raises(ModelError, match=r"rank 1: .*absent"):
            within(LIMIT_S, lambda: load(tiny_spec(tiny), group))
        group.close()
