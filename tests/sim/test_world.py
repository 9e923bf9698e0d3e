"""The world itself: the same seed gives the same history, and what is broken on purpose is found."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tests.sim.outcomes import first_failure

from headrace.api.config import Config
from headrace.api.messages import StepOutput, TerminalState
from headrace.engine.kv_cache.block_pool import BlockPool
from headrace.gateway.flights import InFlight
from headrace.replica.ledger import Ledger
from headrace.sim import __main__ as command
from headrace.sim.draws import draw
from headrace.sim.scenario import Fault, Scenario
from headrace.sim.shrink import Shrinker, describe
from headrace.sim.streams import FrontStream
from headrace.sim.summary import Record
from headrace.sim.world import Outcome, World

PRINT_HISTORIES = """
import logging
from headrace.sim.draws import draw
from headrace.sim.world import World

logging.disable(logging.CRITICAL)
for seed in (2, 7, 23):
    outcome = World(draw(seed)).run()
    print(outcome.history, outcome.num_events, sorted(outcome.requests.items()))
"""


def run_until_failure(seeds: range) -> Outcome:
    """Run seeds until one fails."""
    return first_failure((World(draw(seed)).run() for seed in seeds), f"what {seeds} are to find")


@pytest.mark.slow
def test_a_seed_has_one_history_in_every_process() -> None:
    environment = {**os.environ, "PYTHONHASHSEED": "0"}
    outputs = [
        subprocess.run(
            [sys.executable, "-c", PRINT_HISTORIES],
            capture_output=True,
            text=True,
            env=environment,
            check=True,
        ).stdout
        for _ in range(2)
    ]
    assert outputs[0] == outputs[1]
    assert len(outputs[0]) > 1000


def _tells_a_token_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    real = FrontStream.on_output

    def on_output(self: FrontStream, output: StepOutput, now_s: float) -> bool:
        if self.record.num_resumptions and output.token_ids and output.finish_reason is None:
            output = StepOutput(output.request_id, [*output.token_ids, output.token_ids[-1]])
        return real(self, output, now_s)

    monkeypatch.setattr(FrontStream, "on_output", on_output)


def _forgets_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    real = BlockPool.release
    monkeypatch.setattr(BlockPool, "release", lambda self, table: real(self, table[:-1]))


def _leaks_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(InFlight, "free_slot", lambda self: None)


def _pumps_never(monkeypatch: pytest.MonkeyPatch) -> None:
    from headrace.gateway.binding import Binder

    monkeypatch.setattr(Binder, "pump", lambda self, name, now_s: None)


def _ends_no_aborted_request(monkeypatch: pytest.MonkeyPatch) -> None:
    real = Ledger.close

    def close(self: Ledger, record: Any, state: Any) -> None:
        if state.value != "aborted":
            real(self, record, state)

    monkeypatch.setattr(Ledger, "close", close)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("break_it", "numbers"),
    [
        (_tells_a_token_twice, {0}),
        (_forgets_blocks, {2}),
        (_leaks_slots, {1, 29}),
        (_pumps_never, {9}),
        (_ends_no_aborted_request, {1}),
    ],
)
def test_what_is_broken_on_purpose_is_found(
    break_it: Callable[[pytest.MonkeyPatch], None], numbers: set[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    break_it(monkeypatch)
    outcome = run_until_failure(range(1, 60))
    assert outcome.violation is not None
    assert outcome.violation.number in numbers, outcome.violation


@pytest.mark.slow
def test_a_failing_history_becomes_small(monkeypatch: pytest.MonkeyPatch) -> None:
    _ends_no_aborted_request(monkeypatch)
    outcome = run_until_failure(range(1, 30))
    scenario = draw(outcome.seed)
    shrinker = Shrinker(scenario, outcome, max_runs=60)
    small = shrinker.run()
    assert small.violation is not None
    assert len(shrinker.scenario.faults) + len(shrinker.scenario.clients) <= 2
    text = "\n".join(describe(shrinker.scenario, small))
    assert f"seed {outcome.seed}" in text
    assert "history" in text


@pytest.mark.slow
def test_without_faults_everything_is_answered() -> None:
    refusals = {"overloaded", "queue_full"}
    for seed in range(1, 12):
        scenario = draw(seed)
        # They come when the gateways are there, and wait.
        patient = tuple(
            replace(plan, arrives_s=plan.arrives_s + 5.0, leaves_after_s=None) for plan in scenario.clients
        )
        world = World(replace(scenario, faults=(), clients=patient, ends_s=scenario.ends_s + 5.0))
        outcome = world.run()
        assert outcome.violation is None, f"seed {seed}: {outcome.violation}"
        # A full queue or a wait that is too long may refuse, in an event where the stream was begun while it
        # waited; nothing may break, and no front refuses what a router sent it.
        assert set(outcome.requests) <= {"done", "error status", "error event"}, f"seed {seed}"
        refused = [state for state in world.crowd.states.values() if state.outcome != "done"]
        assert {state.reason for state in refused} <= refusals, f"seed {seed}: {refused}"


def _many_wait(num_fronts: int, seed: int) -> Scenario:
    """Streams that come long before the first replica: all are begun by the relay."""
    endpoint = {
        "model": "good-0",
        "engine": "simulated",
        "replicas": {"min": num_fronts, "max": num_fronts + 1, "standby": 0},
        "simulated": {"step_ms": 30.0, "prefill_ms_per_token": 0.0},
        "queue": {"max_requests": 64, "max_wait_s": 40.0},
    }
    config = Config.model_validate(
        {"endpoints": {"chat": endpoint}, "gateway": {"bind": "127.0.0.1:8000"}, "state_dir": "state"}
    )
    scenario = draw(seed)
    clients = tuple(
        replace(plan, number=number, arrives_s=3.0, endpoint="chat", tenant="", leaves_after_s=None)
        for number, plan in enumerate(scenario.clients[:6])
    )
    return replace(scenario, config=config, clients=clients, faults=(), start_s=8.0, ends_s=60.0)


@pytest.mark.slow
@pytest.mark.parametrize("num_fronts", [2, 3])
def test_streams_begun_by_the_relay_that_all_fronts_refuse_one_after_another_are_served(
    num_fronts: int,
) -> None:
    """A storm of kills, drains and rollouts lost one stream of 1,391 so: its fronts were leaving, all."""
    num_refused = 0
    for seed in range(1, 4):
        # They refuse from before they are ready until some time after it.
        refusals = tuple(
            Fault(4.0 + 0.1 * number, "front refuses", (number + 0.5) / num_fronts, 14.0)
            for number in range(num_fronts)
        )
        world = World(replace(_many_wait(num_fronts, seed), faults=refusals))
        outcome = world.run()
        assert outcome.violation is None, f"seed {seed}: {outcome.violation}"
        assert set(outcome.requests) == {"done"}, f"seed {seed}: {outcome.requests}"
        (router,) = world.all_routers
        ends = router.num_ended()
        assert ends[TerminalState.FINISHED] == sum(ends.values()) == 6, f"seed {seed}: {ends}"
        assert sorted(router.records.values()) == [1] * 6
        num_refused += sum(relay.num_refused for relay in world.relays.values())
    assert num_refused > 0


@pytest.mark.slow
def test_a_killed_engine_costs_no_stream_where_it_may_be_continued() -> None:
    """The fault is aimed at a busy engine: the stream goes on, and its client gets every token once."""
    num_resumed = 0
    for seed in range(1, 20):
        scenario = draw(seed)
        if any(endpoint.streams.resume_attempts == 0 for endpoint in scenario.config.endpoints.values()):
            continue
        clients = tuple(replace(plan, leaves_after_s=None) for plan in scenario.clients)
        kills = tuple(
            Fault(plan.arrives_s + 1.0, "engine killed", 0.37 * number % 1.0)
            for number, plan in enumerate(clients[:2])
        )
        outcome = World(replace(scenario, faults=kills, clients=clients)).run()
        assert outcome.violation is None, f"seed {seed}: {outcome.violation}"
        assert not outcome.requests["cut"], f"seed {seed}: {outcome.requests}"
        num_resumed += outcome.num_resumed
    assert num_resumed > 0


def _durable_worlds() -> Iterator[Scenario]:
    """Some worlds with durable endpoints on two machines, without faults; nobody leaves."""
    for seed in range(1, 80):
        scenario = draw(seed)
        if all(endpoint.streams.durable for endpoint in scenario.config.endpoints.values()):
            clients = tuple(replace(plan, leaves_after_s=None) for plan in scenario.clients)
            yield replace(scenario, clients=clients, faults=(), num_hosts=2, skews=scenario.skews[:1] * 3)


@pytest.mark.slow
def test_lost_machines_cut_no_durable_stream() -> None:
    num_resumed = 0
    for scenario in list(_durable_worlds())[:8]:
        losses = tuple(
            Fault(plan.arrives_s + 1.0, "host lost", 0.5 * (number % 2))
            for number, plan in enumerate(scenario.clients[:4])
        )
        outcome = World(replace(scenario, faults=losses)).run()
        assert outcome.violation is None, f"seed {scenario.seed}: {outcome.violation}"
        assert not outcome.requests["cut"], f"seed {scenario.seed}: {outcome.requests}"
        num_resumed += outcome.num_resumed
    assert num_resumed > 0


@pytest.mark.slow
def test_a_durable_stream_that_is_cut_by_a_lost_machine_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def on_carried_lost(self: Any, carried: Any, reason: str) -> None:
        self.forget(carried)
        carried.stream._end.close()
        carried.stream._on_client_gone()

    monkeypatch.setattr("headrace.replica.resumption.StreamKeeper.on_carried_lost", on_carried_lost)

    def run(scenario: Scenario) -> Outcome:
        losses = tuple(Fault(plan.arrives_s + 1.0, "host lost", 0.0) for plan in scenario.clients[:8])
        return World(replace(scenario, faults=losses)).run()

    outcome = first_failure(map(run, _durable_worlds()), "a cut stream")
    assert outcome.violation is not None
    assert outcome.violation.number == 64, outcome.violation


@pytest.mark.slow
def test_a_paused_rollout_rests_with_both_versions_and_a_replica_too_many_is_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A user who pauses keeps the replicas as they are: what rests is what the versions' counts say."""
    scenario = draw(1674)
    applied, paused = (
        fault for fault in scenario.faults if fault.kind in ("version applied", "rollout steered")
    )
    scenario = replace(scenario, faults=(applied, paused), clients=())
    world = World(scenario)
    outcome = world.run()
    assert outcome.violation is None, outcome.violation
    assert world.controller is not None
    state = world.controller.state
    assert state is not None
    [desired] = state.desired(world.controller.host.now_s())
    assert [version.count for version in desired.versions] == [2, 2]
    assert len(world.supervisor.children) == len(("controller", "router", "haproxy", "relay")) + 5

    monkeypatch.setattr("headrace.control.reconciler._Turn._drop_surplus", lambda self, is_some_missing: None)
    scaled = Fault(applied.at_s, "scaled", 0.0, amount=0.3)
    outcome = World(replace(scenario, faults=(scaled,))).run()
    assert outcome.violation is not None
    assert "the fleet is as wanted" in outcome.violation.name


@pytest.mark.slow
def test_the_command_says_what_it_took_and_keeps_it(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "record.jsonl"
    for _ in range(2):
        assert command.main(["--seeds", "2-4", "--record", str(path)]) == 0
    records = [msgspec.json.decode(line, type=Record) for line in path.read_bytes().splitlines()]
    assert [record.seeds for record in records] == [[2, 4], [2, 4]]
    assert records[0].events == records[1].events
    assert records[0].simulated_s > 60
    printed = capsys.readouterr().out
    assert "seeds: 3, of which 0 failed" in printed
    assert "hours per CPU second" in printed
    assert "requests by end: done" in printed


@pytest.mark.slow
def test_the_command_fails_when_a_seed_does(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _pumps_never(monkeypatch)
    assert command.main(["--seeds", "2-6", "--fast"]) == 1
    assert "of which 0 failed" not in capsys.readouterr().out


@pytest.mark.parametrize("text", ["", "5-2", "a-b", "-3"])
def test_a_wrong_range_of_seeds_is_refused_with_what_is_allowed(
    text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        command.main([f"--seeds={text}"])
    assert caught.value.code == 2
    assert "A-B" in capsys.readouterr().err
