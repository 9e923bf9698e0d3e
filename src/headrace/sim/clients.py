"""Clients: what each asks and when, what it was sent, and how it ended.

Owns the clients' view, the only one that counts: each request ends exactly once, and what was received is
the beginning of the right answer, all of it where the answer is said to be complete.
Must not know anything behind the public port.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from headrace.sim.answers import Question, expected_tokens
from headrace.sim.http import HttpAnswer, HttpError, HttpRequest, public_address
from headrace.sim.invariants import Violation
from headrace.sim.machine import Host, Process, Registry
from headrace.sim.network import End, Weather, connect

Outcome = Literal["done", "error status", "error event", "cut", "left", "unreachable"]


@dataclass(frozen=True, slots=True)
class ClientPlan:
    """One client: when it comes, what it asks, and when it loses patience."""

    number: int
    arrives_s: float
    endpoint: str
    tenant: str
    question: Question
    leaves_after_s: float | None = None


@dataclass(slots=True)
class ClientState:
    """What became of it so far."""

    plan: ClientPlan
    began_s: float = 0.0
    received: tuple[int, ...] = ()
    outcome: Outcome | None = None
    status: int = 0
    reason: str = ""
    ended_s: float = 0.0
    first_token_s: float = 0.0
    end: End | None = None
    front_id: str = ""
    """Who answers it, and under which id; empty: nobody does yet."""
    request_id: str = ""
    gateway: str = ""
    """Whose connection it has."""


class Crowd(Process):
    """All clients, as one process that never breaks."""

    is_outside = True

    def __init__(
        self,
        registry: Registry,
        host: Host,
        weather: Weather,
        kind_of: Callable[[str], str],
        gateways: list[str],
        judge_cut: Callable[[ClientState], Violation | None],
    ) -> None:
        """kind_of: which engine an endpoint has, for the right answer. judge_cut: what is wrong with it
        that a client's stream was cut."""
        super().__init__(registry, "clients", host)
        self._weather = weather
        self._kind_of = kind_of
        self._judge_cut = judge_cut
        self._addresses_public = [public_address(gateway) for gateway in gateways]
        self.states: dict[int, ClientState] = {}
        self.outcomes: Counter[str] = Counter()

    @property
    def num_open(self) -> int:
        return len(self.states) - sum(self.outcomes.values())

    def expect(self, plans: list[ClientPlan]) -> None:
        """Let them come."""
        for plan in plans:
            self.after(plan.arrives_s, lambda plan=plan: self._arrive(plan), "client")  # type: ignore[misc]

    def _arrive(self, plan: ClientPlan) -> None:
        state = self.states[plan.number] = ClientState(plan, self.timeline.now_s)
        living = [address for address in self._addresses_public if address in self.registry.listeners]
        if not living:
            self._finish(state, "unreachable")
            return
        address = self.random.choice(living)
        state.gateway = address.removeprefix(public_address(""))
        connect(
            self,
            self._weather,
            address,
            lambda end: self._on_connected(state, end),
            lambda: self._finish(state, "unreachable"),
        )
        if plan.leaves_after_s is not None:
            self.after(plan.leaves_after_s, lambda: self._leave(state), "client leaves")

    def _on_connected(self, state: ClientState, end: End) -> None:
        if state.outcome is not None:
            end.close()
            return
        state.end = end
        end.on_message = lambda answer: self._on_answer(state, answer)
        end.on_close = lambda: self._on_close(state)
        plan = state.plan
        end.send(HttpRequest(plan.endpoint, plan.tenant, plan.question))

    def _on_answer(self, state: ClientState, answer: HttpAnswer) -> None:
        name = f"client {state.plan.number}"
        assert state.outcome is None, f"{name} got {answer} after its end ({state.outcome})"
        if isinstance(answer, HttpError):
            assert not state.received, f"{name} got status {answer.status} inside its stream"
            state.status, state.reason = answer.status, answer.reason
            self._finish(state, "error status")
            return
        if answer.front_id:
            assert state.front_id in ("", answer.front_id), f"{name} is answered by {answer.front_id}, too"
            state.front_id, state.request_id = answer.front_id, answer.request_id
        if answer.token_ids and not state.received:
            state.first_token_s = self.timeline.now_s
        state.received += tuple(answer.token_ids)
        expected = expected_tokens(state.plan.question, self._kind_of(state.plan.endpoint))
        num_received = len(state.received)
        assert state.received == expected[:num_received], (
            f"{name} got {state.received}, the answer begins {expected[:num_received]}"
        )
        if answer.end == "done":
            assert num_received == len(expected), (
                f"{name} got {num_received} of {len(expected)} tokens and the end"
            )
            self._finish(state, "done")
        elif answer.end == "error":
            state.reason = answer.reason
            self._finish(state, "error event")

    def _on_close(self, state: ClientState) -> None:
        if state.outcome is None:
            self._finish(state, "cut")
            violation = self._judge_cut(state) if state.front_id else None
            if violation is not None:
                raise violation

    def _leave(self, state: ClientState) -> None:
        if state.outcome is None:
            self._finish(state, "left")
            if state.end is not None:
                state.end.close()

    def _finish(self, state: ClientState, outcome: Outcome) -> None:
        assert state.outcome is None, f"client {state.plan.number} ends twice: {state.outcome}, {outcome}"
        state.outcome = outcome
        state.ended_s = self.timeline.now_s
        self.outcomes[outcome] += 1
