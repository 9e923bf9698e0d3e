"""The ground that simulated processes stand on: order, delay, death and standstill."""

from __future__ import annotations

from typing import Any

from headrace.sim.machine import Host, Process, Registry
from headrace.sim.network import Connection, End, Weather, connect
from headrace.sim.timeline import Timeline


class Reader(Process):
    """Keeps what it reads."""

    def __init__(self, registry: Registry, name: str) -> None:
        super().__init__(registry, name, Host(registry.timeline, name, 0.0))
        self.got: list[Any] = []

    def accept(self, address: str, connection: object) -> None:
        assert isinstance(connection, End)
        connection.on_message = self.got.append
        connection.on_close = lambda: self.got.append("closed")


def make_world(seed: int = 1) -> tuple[Timeline, Registry]:
    timeline = Timeline(seed)
    return timeline, Registry(timeline, lambda process: None)


def run(timeline: Timeline, end_s: float) -> None:
    while timeline.run_next(end_s):
        pass


def test_a_connection_keeps_its_order_whatever_each_message_takes() -> None:
    timeline, registry = make_world()
    sender, reader = Reader(registry, "a"), Reader(registry, "b")
    weather = Weather()
    connection = Connection(registry, weather, sender, reader)
    near, far = connection.ends
    far.on_message = reader.got.append
    for number in range(200):
        weather.latency_s = 0.5 if number % 7 == 0 else 0.001
        near.send(number)
    run(timeline, 10.0)
    assert reader.got == list(range(200))


def test_what_was_sent_before_a_death_is_read_before_the_close() -> None:
    timeline, registry = make_world()
    sender, reader = Reader(registry, "a"), Reader(registry, "b")
    connection = Connection(registry, Weather(), sender, reader)
    near, far = connection.ends
    far.on_message, far.on_close = reader.got.append, lambda: reader.got.append("closed")
    near.send("last words")
    sender.kill()
    run(timeline, 1.0)
    assert reader.got == ["last words", "closed"]


def test_a_stopped_process_reads_everything_in_order_when_it_goes_on() -> None:
    timeline, registry = make_world()
    sender, reader = Reader(registry, "a"), Reader(registry, "b")
    connection = Connection(registry, Weather(), sender, reader)
    near, far = connection.ends
    far.on_message = reader.got.append
    reader.pause()
    timer = reader.after(0.1, lambda: reader.got.append("cancelled"), "test")
    near.send(1)
    near.send(2)
    run(timeline, 1.0)
    assert reader.got == []
    timer.cancel()
    reader.resume()
    run(timeline, 2.0)
    assert reader.got == [1, 2]


def test_a_cut_loses_what_is_under_way_and_each_side_hears_in_its_own_time() -> None:
    timeline, registry = make_world()
    sender, reader = Reader(registry, "a"), Reader(registry, "b")
    connection = Connection(registry, Weather(), sender, reader)
    near, far = connection.ends
    near.on_close = lambda: sender.got.append(timeline.now_s)
    far.on_message, far.on_close = reader.got.append, lambda: reader.got.append(timeline.now_s)
    near.send("lost")
    connection.cut((0.0, 3.0))
    run(timeline, 10.0)
    assert sender.got == [0.0]
    assert reader.got == [3.0]


def test_nobody_listening_refuses_and_a_listener_accepts_before_it_reads() -> None:
    timeline, registry = make_world()
    client, server = Reader(registry, "a"), Reader(registry, "b")
    outcomes: list[str] = []

    def on_connected(end: End) -> None:
        outcomes.append("connected")
        end.send("hello")

    def go() -> None:
        connect(client, Weather(), "there", on_connected, lambda: outcomes.append("refused"))

    go()
    run(timeline, 1.0)
    server.listen("there")
    go()
    run(timeline, 2.0)
    assert outcomes == ["refused", "connected"]
    assert server.got == ["hello"]


def test_one_source_of_randomness_per_name_and_seed() -> None:
    draws = [Timeline(seed).random(name).random() for seed in (1, 2) for name in ("a", "b")]
    assert len(set(draws)) == 4
    assert Timeline(1).random("a").random() == draws[0]


def test_a_machine_that_is_cut_off_is_tried_for_a_second_and_its_own_processes_reach_each_other() -> None:
    timeline, registry = make_world()
    weather = Weather()
    client, server = Reader(registry, "a"), Reader(registry, "b")
    neighbour, outside = Reader(registry, "c"), Reader(registry, "d")
    server.host = neighbour.host = Host(timeline, "apart", 0.0)
    outside.is_outside = True  # as clients are
    server.listen("there")
    outcomes: list[tuple[str, str, float]] = []

    def go(process: Reader) -> None:
        def note(outcome: str) -> None:
            outcomes.append((process.name, outcome, round(timeline.now_s, 2)))

        connect(process, weather, "there", lambda _: note("connected"), lambda: note("refused"))

    weather.cut_off(server.host, 3.0)
    for process in (client, neighbour, outside):
        go(process)
    run(timeline, 2.5)
    go(client)
    run(timeline, 5.0)
    assert outcomes == [
        ("c", "connected", 0.0),
        ("d", "connected", 0.0),
        ("a", "refused", 1.0),
        ("a", "connected", 3.0),
    ]
