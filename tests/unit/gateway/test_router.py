"""The router's shell: what HAProxy says in one order on one socket may be read in another on two."""

from __future__ import annotations

from pathlib import Path

import msgspec

from headrace.api.messages import EndpointRule, GatewaySpec
from headrace.clock import VirtualClock
from headrace.gateway.completions import Completion
from headrace.gateway.paths import GatewayPaths
from headrace.gateway.request_recorder import PARTS_LIMIT_S
from headrace.gateway.router import Router


class Call:
    """One announcement that waits for its answer."""

    def __init__(self) -> None:
        self.connection = self
        self.answers: list[bytes] = []

    def answer(self, actions: bytes) -> None:
        self.answers.append(actions)


class World:
    """A router that nothing is connected to."""

    def __init__(self, run_dir: Path) -> None:
        spec = GatewaySpec(str(run_dir), "127.0.0.1:8000", [EndpointRule("chat", "m", 3, 10.0)])
        self.log = Path(GatewayPaths(spec.run_dir, spec.gateway_id).request_log)
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self.clock = VirtualClock(100.0)
        self.router = Router(spec, self.clock, 20_000)

    def announce(self, pass_name: str = "") -> Call:
        call = Call()
        arguments = {b"id": b"hr-g1-1", b"endpoint": b"ep-chat", b"pass": pass_name.encode()}
        self.router._on_notify(call, b"decide", arguments)  # type: ignore[arg-type]
        return call

    def end(self, backend: str) -> None:
        """HAProxy's line of a pass whose client left."""
        line = Completion("hr-g1-1", backend=backend, server="<NOSRV>", status=-1, termination="C-")
        self.router._on_completion(line)

    def lines(self) -> list[dict[str, object]]:
        """The request log, when the router has gone."""
        self.clock.advance(2 * PARTS_LIMIT_S)
        self.router.recorder.tick(self.clock.now_s())
        self.router.recorder.hand_out()
        self.router._request_log.close(10.0)
        self.router._closed_peers.close()
        return [msgspec.json.decode(line) for line in self.log.read_bytes().splitlines()]


async def test_a_pass_that_is_announced_after_its_line_gets_no_second_line(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.announce()
    world.end("headrace-relay")  # the client left while its request waited in the relay
    world.end("ep-chat")  # the line of the pass that was under way
    assert len(world.announce("2").answers) == 1, "it is let go"
    assert [line["state"] for line in world.lines()] == ["aborted"]


async def test_a_request_that_is_announced_after_its_line_gets_no_second_line(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.end("ep-chat")
    assert len(world.announce().answers) == 1
    assert [line["state"] for line in world.lines()] == ["aborted"]
