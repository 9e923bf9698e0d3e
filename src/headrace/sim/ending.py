"""The whole system is told to end: when that began, by when all must be gone, and what clients may see of it.

Owns the wish and what is checked of how it is followed. Must not know how the system ends.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from headrace.control.drain import MARGIN_S
from headrace.control.essentials import GATEWAY_GRACE_S
from headrace.fabric.supervisor import CONTROLLER_NAME, CONTROLLER_SILENCE_S, STOP_GRACE_S
from headrace.sim.clients import ClientState
from headrace.sim.invariants import Violation
from headrace.sim.machine import Process
from headrace.sim.scenario import ENDING_NOTHING, Fault

if TYPE_CHECKING:
    from headrace.sim.world import World

CONTROLLER_RESTARTS_S = 30.0
"""For a controller that was killed, or stopped for a while, after it was told to end the system."""
HEARD_BY_S = 10.0
"""After the last process: whoever had a connection knows that it is gone."""
ASK_AGAIN_S = 1.0
HURRY_S = 1.0
"""Who came so closely before the end may have met a listener that was just closed."""


class Ending:
    """The end of one world's system."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._controller_pid = 0
        """Of the controller that is waited for."""
        self.began_s = -1.0
        """When it was told to end, and heard it; negative: it was not."""
        self.is_asked = False
        """Somebody tells it to end, until it hears."""
        self.is_over = False

    def begin(self, fault: Fault) -> str:
        """Send SIGTERM to `headrace up`, or ask the controller, as `headrace down` does. On a cluster there
        is nobody else to be told."""
        world = self._world
        if self.is_asked:
            return ""
        self.is_asked = True
        if fault.amount < 0.5 and world.nodes is None:
            self._note_begin()
            world.supervisor.stop()
            return "SIGTERM"
        self._ask()
        return "headrace down"

    def grace_s(self) -> float:
        """Return what streams are left at least."""
        if self._world.supervisor.has_stopped_alone:
            return 0.0
        return min(self._graces())

    def judge_start(self, name: str) -> None:
        """A process is started. Raises Violation if none may be."""
        if self.began_s >= 0 and self._world.supervisor.is_stopping:
            raise Violation(81, "an ending system starts nothing", f"{name} is started")

    def problem(self) -> Violation | None:
        """Return what was not as it should be, once all is over."""
        world = self._world
        for number, state in world.crowd.states.items():
            if state.outcome is None:
                return Violation(1, "every request ends", f"client {number} waits for ever")
            if problem := self._early(state):
                return Violation(81, "an ending system ends its streams", f"client {number}: {problem}")
        return None

    def _ask(self) -> None:
        """`headrace down`: until a controller hears it."""
        world = self._world
        controller = world.controller
        if self.began_s >= 0:
            return
        is_there = controller is not None and controller.is_alive and not controller.is_paused
        if is_there and controller is not None and controller.shut_down():
            self._note_begin()
        else:
            world.timeline.after(ASK_AGAIN_S, self._ask, "user asks again")

    def _note_begin(self) -> None:
        world = self._world
        self.began_s = world.timeline.now_s
        world.note("the system is told to end")
        self._controller_pid = world.controller.pid if world.controller is not None else 0
        world.timeline.after(self._limit_s(), self._look, "end of the system")

    def _limit_s(self) -> float:
        """The waits of a drain one after the other, what follows it, and what is heard of late."""
        drain_s = max(self._graces()) + MARGIN_S + 1.0 + GATEWAY_GRACE_S + MARGIN_S
        return drain_s + STOP_GRACE_S + 2 * CONTROLLER_SILENCE_S + 4.0

    def _graces(self) -> list[float]:
        world = self._world
        configs = (world.scenario.config, world.run_directory.config)
        return [endpoint.drain_grace_s for config in configs for endpoint in config.endpoints.values()]

    def _look(self) -> None:
        """Everything must be gone. A controller that was lost meanwhile has begun anew."""
        world = self._world
        alive = [child for child in world.supervisor.children.values() if child.is_alive]
        controller = world.supervisor.children.get(CONTROLLER_NAME)
        pid = controller.pid if controller is not None else self._controller_pid
        if alive and pid != self._controller_pid:
            self._controller_pid = pid
            world.timeline.after(self._limit_s() + CONTROLLER_RESTARTS_S, self._look, "end of the system")
            return
        if alive:
            raise Violation(81, "an ending system is gone in time", f"{_named(alive)} live")
        world.note("the system is gone")
        world.timeline.after(HEARD_BY_S, self._end, "end of the system")

    def _end(self) -> None:
        self.is_over = True

    def _early(self, state: ClientState) -> str:
        """Say how a stream that had time or a held request ended, if not well."""
        if set(self._world.breaker.counts) - ENDING_NOTHING or state.ended_s < self.began_s:
            return ""
        since_s = state.ended_s - self.began_s
        if state.began_s > self.began_s - HURRY_S:
            return ""
        if state.outcome == "cut" and not state.front_id:
            return f"nobody answered it, and it was cut after {since_s:.2f} s"
        if state.front_id in self._world.stopped_fronts:  # its grace began before
            return ""
        if since_s >= self.grace_s():
            return ""
        if state.outcome == "cut":
            return f"it was cut after {since_s:.2f} s"
        if state.outcome == "error event" and state.received and "leaving" in state.reason:
            return f"it got {state.reason!r} after {since_s:.2f} s"
        return ""


def _named(processes: list[Process]) -> str:
    return ", ".join(process.name for process in processes[:6])
