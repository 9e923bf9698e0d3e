"""What people see: the status tables and the progress of `headrace up`."""

from __future__ import annotations

import io
import sys
from typing import Any

import msgspec
import pytest
from rich.console import Console

from headrace.api.messages import (
    EndpointStatus,
    GatewayStatus,
    NodeStatus,
    ProcessStatus,
    ReplicaStatus,
    RolloutStatus,
    StepModel,
    SystemStatus,
    TenantStatus,
)
from headrace.cli.progress import LiveProgress, PlainProgress, greeting, make_progress
from headrace.cli.rollout import describe
from headrace.cli.status import render
from headrace.control.serve import describe_unready, hopeless_error


def replica(replica_id: str, state: Any, *, phase: str = "", last_error: str = "") -> ReplicaStatus:
    return ReplicaStatus(
        replica_id, "chat", state, phase, "127.0.0.1:4000", 11, 12, 3, 2, 1, 0.25, 1, 2, 61.0, last_error
    )


def system(*replicas: ReplicaStatus, is_ready: bool = False) -> SystemStatus:
    states = [each.state for each in replicas]
    endpoint = EndpointStatus(
        "chat",
        "/models/some.gguf",
        "native",
        len(replicas),
        states.count("ready"),
        states.count("starting") + states.count("pending"),
        states.count("failed"),
        5,
        1.5,
        7,
        100,
        1,
        2,
        3,
        "replicas.min is 2",
    )
    process = ProcessStatus("router-g1", 10, "running", 0, 50 * 2**20)
    url = "http://127.0.0.1:8000/v1"
    gateways = [
        GatewayStatus("g1", "running", "running", True, 4, 1.5, 6, 2),
        GatewayStatus("g2", "restarting", "running", False, 1, 0.5, 1, 0),
    ]
    return SystemStatus(
        "0.1.0",
        url,
        75.0,
        is_ready,
        [endpoint],
        list(replicas),
        [process],
        "/run/headrace/default",
        gateways=gateways,
    )


def test_the_status_says_what_a_replicas_steps_take() -> None:
    console = Console(file=io.StringIO(), width=120)
    model = StepModel(0.0041, 1.2e-5, 1e-9, 3.1e-4, 1.5e-8, 0.034)
    measured = msgspec.structs.replace(replica("chat-1", "ready"), step_model=model, busy_ratio=0.37)
    console.print(render(system(measured, replica("chat-2", "ready"))))
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    line = "chat-1: 37% busy, a step takes 4.1 ms + 12 µs/prompt token + 310 µs/output token"
    assert line in text
    assert "chat-2: 0% busy" not in text


def test_the_status_says_what_a_replica_computes_with() -> None:
    path = "bfloat16 mkldnn, 2 threads; no compiled kernels"
    console = Console(file=io.StringIO(), width=120)
    ready = msgspec.structs.replace(replica("chat-1", "ready"), arithmetic=path)
    console.print(render(system(ready, replica("chat-2", "ready"))))
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert f"chat-1: computes in {path}" in text
    assert "chat-2: computes" not in text


def test_the_status_says_what_a_start_took_while_that_is_news() -> None:
    phases = {"starting python": 0.05, "importing torch": 1.25, "finding the model": 0.0, "mapping": 0.1}
    fresh = msgspec.structs.replace(replica("chat-1", "ready"), start_phases=phases, since_s=5.0)
    old = msgspec.structs.replace(replica("chat-2", "ready"), start_phases=phases, since_s=500.0)
    resting = msgspec.structs.replace(replica("chat-3", "standby", phase="asleep at level 1"))
    console = Console(file=io.StringIO(), width=120)
    console.print(render(system(fresh, old, resting)))
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert (
        "chat-1: its engine started in 1.4 s: importing torch 1.2 s, mapping 100 ms, starting python" in text
    )
    assert "chat-2: its engine" not in text
    assert "chat-3: asleep at level 1" in text


@pytest.mark.parametrize("width", [80, 120])
def test_the_status_fits_the_screen_with_every_column_and_gateway(width: int) -> None:
    console = Console(file=io.StringIO(), width=width)
    console.print(render(system(replica("chat-1", "ready"), replica("chat-2", "starting"))))
    assert isinstance(console.file, io.StringIO)
    lines = console.file.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    gateways = [line.split() for line in lines if line.startswith(("g1", "g2"))]
    assert gateways == [
        ["g1", "running", "running", "4", "1.5", "s", "6", "2"],
        ["g2", "restarting", "silent", "1", "500", "ms", "1", "0"],
    ]
    for column in ("oldest", "refused", "cached", "restarts"):
        assert any(column in line for line in lines), f"{column} at {width}: {lines}"


def test_the_status_shows_states_errors_and_where_the_logs_are() -> None:
    console = Console(file=io.StringIO(), width=140)
    console.print(
        render(system(replica("chat-1", "ready"), replica("chat-2", "failed", last_error="[no] room")))
    )
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    for words in (
        "not ready",
        "/run/headrace/default",
        "1/2",
        "some.gguf",
        "chat-2",
        "failed",
        "[no] room",
        "50.0 MiB",
    ):
        assert words in text


def test_the_status_fits_eighty_columns() -> None:
    console = Console(file=io.StringIO(), width=80)
    console.print(render(system(replica("chat-1", "ready"), is_ready=True)))
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    for words in ("chat-1", "127.0.0.1:4000", "ready", "1/1", "100"):
        assert words in text


def test_tenants_have_a_table_that_fits_eighty_columns_when_there_are_any() -> None:
    ready = system(replica("chat-1", "ready"), is_ready=True)
    acme = TenantStatus("chat", "acme", 2.0, "high", 12, 3.5, 64, 100, 1234, 56, 70_000, 8_000_000, 0.75)
    nobody = msgspec.structs.replace(acme, tenant="")
    shown = []
    for tenants in ([acme], [nobody]):
        console = Console(file=io.StringIO(), width=80)
        console.print(render(msgspec.structs.replace(ready, tenants=tenants)))
        assert isinstance(console.file, io.StringIO)
        shown.append(console.file.getvalue())
    waits = "acme at chat: its oldest held request waits 3.5 s"
    for words in ("acme", "high ×2", "75%", waits, "1234", "8070k"):
        assert words in shown[0]
    assert "priority" not in shown[1]


def test_plain_progress_says_each_change_once(capsys: pytest.CaptureFixture[str]) -> None:
    progress = PlainProgress(0.0)
    for _ in range(3):
        progress.show(system(replica("chat-1", "starting", phase="loading weights")))
    progress.show(system(replica("chat-1", "pending", last_error="exited with 1: no memory")))
    progress.ready(system(replica("chat-1", "ready"), is_ready=True))
    captured = capsys.readouterr()
    lines = [line.split("s  ", 1)[1] for line in captured.err.splitlines()]
    assert lines == ["chat-1 starting: loading weights", "chat-1 pending: exited with 1: no memory"]
    assert captured.out.startswith("ready: http://127.0.0.1:8000/v1 after ")


def test_live_progress_draws_and_closes_without_a_thread(capsys: pytest.CaptureFixture[str]) -> None:
    import threading

    num_threads = threading.active_count()
    progress = LiveProgress(0.0)
    progress.show(system(replica("chat-1", "starting", phase="loading weights")))
    assert threading.active_count() == num_threads
    progress.notice("the controller [ended]")
    progress.ready(system(replica("chat-1", "ready"), is_ready=True))
    progress.close()
    captured = capsys.readouterr()
    assert "ready: http" in captured.out
    assert "the controller [ended]" in captured.err


def test_a_pipe_gets_plain_lines() -> None:
    assert not sys.stderr.isatty()
    assert isinstance(make_progress(0.0), PlainProgress)


def test_the_greeting_holds_a_request_to_try() -> None:
    text = greeting(system(replica("chat-1", "ready")), 2.0)
    assert "curl -s http://127.0.0.1:8000/v1/chat/completions" in text
    assert '"model": "chat"' in text


def test_only_a_system_where_everything_failed_is_hopeless() -> None:
    failed = replica("chat-2", "failed", last_error="damaged")
    assert hopeless_error(system(replica("chat-1", "ready"), failed)) == ""
    assert hopeless_error(system(replica("chat-1", "starting"), failed)) == ""
    assert "chat-2 is failed: damaged" in hopeless_error(system(failed))
    assert hopeless_error(system()) == ""
    gateway = ProcessStatus("haproxy-g1", 0, "failing", 5, 0, "cannot bind socket")
    status = msgspec.structs.replace(system(replica("chat-1", "ready")), processes=[gateway])
    assert hopeless_error(status) == "haproxy-g1 is failing: cannot bind socket"
    assert describe_unready(None) == "its controller never answered"


def test_the_status_has_standby_and_rollouts_where_there_are_any_and_says_when_a_replica_is_expected() -> (
    None
):
    def text(status: SystemStatus) -> str:
        console = Console(file=io.StringIO(), width=140)
        console.print(render(status))
        assert isinstance(console.file, io.StringIO)
        return console.file.getvalue()

    plain = system(replica("chat-1", "ready"))
    assert "standby" not in text(plain)
    (endpoint,) = plain.endpoints
    endpoint = msgspec.structs.replace(endpoint, standby=1, desired_standby=2, num_held=3, eta_s=4.0)
    running = RolloutStatus("chat", "running", "aaa", "bbb", 0.1, "7 of 20 requests", 65.0, 2, 1)
    shown = text(msgspec.structs.replace(plain, endpoints=[endpoint], rollouts=[running]))
    assert "1/2" in shown
    assert "a replica is expected in about 4.0 s" in shown
    assert "chat: rollout aaa -> bbb running at 10% of the requests, 7 of 20 requests" in shown
    unknown = msgspec.structs.replace(endpoint, eta_s=-1.0)
    assert "when a replica can serve them is not known" in text(
        msgspec.structs.replace(plain, endpoints=[unknown])
    )
    assert describe(running) == [
        "chat: running for 65.0 s",
        "  old aaa: 2 replicas ready, 90% of the requests",
        "  new bbb: 1 replica ready, 10% of the requests",
        "  7 of 20 requests",
    ]


def draw(status: SystemStatus) -> str:
    console = Console(file=io.StringIO(), width=160)
    console.print(render(status))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_nodes_of_a_cluster_are_shown_with_what_is_free_and_who_is_there() -> None:
    labels = {"ray.io/node-id": "x", "zone": "a"}
    nodes = [
        NodeStatus("0123456789abcdef", "10.0.0.1", True, {"CPU": 4.0}, {"CPU": 1.5}, labels, ["chat-1"]),
        NodeStatus("fedcba9876543210", "10.0.0.2", False, {}, {}, {}, ["chat-2"]),
        NodeStatus("ab" * 8, "10.0.0.3", True, {}, {}, {}, [], leaving="draining for 23 s more, by Ray"),
    ]
    waits = replica("chat-2", "starting", phase="waits for room: CPU 4 is asked")
    shown = draw(msgspec.structs.replace(system(replica("chat-1", "ready"), waits), nodes=nodes))
    lines = [line.split() for line in shown.splitlines()]
    assert ["01234567", "10.0.0.1", "alive", "CPU", "1.5/4", "chat-1", "zone=a"] in lines
    assert ["fedcba98", "10.0.0.2", "gone", "chat-2"] in lines
    assert "draining for 23 s more, by Ray" in shown
    assert "chat-2: waits for room: CPU 4 is asked" in shown


def test_one_machine_has_no_table_of_nodes() -> None:
    assert "labels" not in draw(system(replica("chat-1", "ready")))
