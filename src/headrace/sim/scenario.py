"""What one seed means: a config, clients, and faults, all drawn before anything runs.

Owns what every world has; `draws` adds what some have. A scenario is plain data, so that a failing one can be
run again with parts left out. Must not know the world in which it happens.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import Literal

from headrace.api.config import Config
from headrace.sim.answers import Question, make_prompt
from headrace.sim.clients import ClientPlan
from headrace.sim.engines import EngineBehaviour

FaultKind = Literal[
    "engine killed",
    "engine hung",
    "engine paused",
    "front killed",
    "front paused",
    "router killed",
    "router paused",
    "haproxy killed",
    "relay killed",
    "controller killed",
    "controller paused",
    "host lost",
    "link cut",
    "links stalled",
    "network slow",
    "reports doubled",
    "clock jumped",
    "starts refused",
    "scaled",
    "version applied",
    "bad version applied",
    "replica slept",
    "rollout steered",
    "notice given",
    "durable front killed",
    "durable front paused",
    "front refuses",
    "gateway lost",
    "gateway cut off",
    "gateway drained",
    "system ended",
    "metric said",
]
WEIGHTS: dict[FaultKind, int] = {
    "engine killed": 6,
    "engine hung": 1,
    "engine paused": 2,
    "front killed": 4,
    "front paused": 3,
    "router killed": 2,
    "router paused": 2,
    "haproxy killed": 1,
    "controller killed": 3,
    "controller paused": 2,
    "host lost": 1,
    "link cut": 5,
    "links stalled": 3,
    "network slow": 2,
    "reports doubled": 1,
    "clock jumped": 2,
    "starts refused": 1,
    "scaled": 5,
    "version applied": 3,
    "bad version applied": 2,
    "replica slept": 2,
    "rollout steered": 2,
    "notice given": 2,
}
DURABLE_RATIO = 0.25
"""Of the seeds, have durable endpoints."""
RELAY_RATIO = 0.15
REFUSAL_RATIO = 0.2
DURABLE_KINDS: tuple[FaultKind, ...] = (
    "host lost",
    "host lost",
    "front killed",
    "front killed",
    "engine killed",
    "durable front killed",
    "durable front paused",
)
PAUSES = frozenset(
    {
        "engine paused",
        "front paused",
        "router paused",
        "controller paused",
        "links stalled",
        "durable front paused",
    }
)
ENDING_NOTHING: frozenset[FaultKind] = frozenset(
    {
        "system ended",
        "router paused",
        "controller killed",
        "engine killed",
        "scaled",
        "reports doubled",
        "metric said",
    }
)
"""Beside these a stream has no reason to end before its grace is over."""
CALM_S = 15.0
"""Without faults at the beginning, so that there is something to break."""


@dataclass(frozen=True, slots=True)
class Fault:
    """Something that happens. `pick` in [0, 1) chooses among what there is then."""

    at_s: float
    kind: FaultKind
    pick: float
    duration_s: float = 0.0
    amount: float = 0.0

    def __str__(self) -> str:
        text = f"{self.at_s:8.3f} s  {self.kind}"
        return f"{text} for {self.duration_s:.2f} s" if self.duration_s else text


@dataclass(frozen=True, slots=True)
class Scenario:
    """Everything that a run depends on, beside the code."""

    seed: int
    config: Config
    clients: tuple[ClientPlan, ...]
    faults: tuple[Fault, ...]
    ends_s: float
    """When faults stop; clients have all come by then."""
    num_hosts: int
    skews: tuple[float, ...]
    busy_interval_s: float
    """Between two reports of a busy replica. The product's is 0.05 s; a machine that is short of time is
    slower, and so many reports cost a third of a seed's time."""
    start_s: float
    """Mean start of an engine."""
    node_skews: tuple[float, ...] = ()
    """Of the machines that gateways are on; empty: they are beside the controller."""

    def behaviour(self, model: str) -> EngineBehaviour:
        """What engines of a model do: its name says it."""
        if model.startswith("bad"):
            return EngineBehaviour(0.5 * self.start_s, True, model.endswith("hopeless"))
        return EngineBehaviour(self.start_s, step_factor=2.0 if model.startswith("slow") else 1.0)


def draw_basis(seed: int, hours: float = 0.0) -> Scenario:
    """Return the scenario of a seed, without what only some worlds have (`draws`). hours: how long it goes
    on, 0: some minutes."""
    random = Random(f"scenario {seed}")  # noqa: S311, not a secret
    # Of their own, so that what is drawn beside them stays what it was.
    further = Random(f"further {seed}")  # noqa: S311, not a secret
    config = _with_durable(further, _draw_config(random))
    ends_s = hours * 3600 if hours else random.choice((30.0, 45.0, 60.0, 120.0))
    faults = _draw_faults(random, ends_s, config)
    num_hosts = random.randint(1, 3)
    return Scenario(
        seed=seed,
        config=config,
        clients=_draw_clients(random, config, ends_s),
        faults=_with_extras(further, faults, ends_s, config),
        ends_s=ends_s,
        num_hosts=num_hosts,
        skews=tuple(random.uniform(-1e-3, 1e-3) for _ in range(num_hosts + 1)),
        busy_interval_s=random.choice((0.05, 0.25, 0.5, 0.5)),
        start_s=random.choice((0.5, 2.0, 8.0)),
    )


def _draw_config(random: Random) -> Config:
    kind = "native" if random.random() < 0.12 else "simulated"
    endpoints = {
        name: _draw_endpoint(random, kind) for name in ("chat", "code")[: 1 + (random.random() < 0.25)]
    }
    tenants: dict[str, object] = {}
    if random.random() < 0.35:
        tenants = {
            name: {
                "weight": random.choice((1, 2, 4)),
                "priority": random.choice(("high", "normal", "normal", "low")),
                "limits": {"max_concurrent": random.choice((0, 0, 1, 3))},
                "keys": [],
            }
            for name in ("acme", "beta", "gamma")[: random.randint(1, 3)]
        }
    gateway = {"count": random.choice((1, 2, 2, 3)), "bind": "127.0.0.1:8000"}
    tree = {"endpoints": endpoints, "gateway": gateway, "tenants": tenants, "state_dir": "state"}
    return Config.model_validate(tree)


def _draw_endpoint(random: Random, kind: str) -> dict[str, object]:
    maximum = random.randint(1, 4)
    minimum = random.choice((0, 1, 1, 2, 3))
    is_native = kind == "native"
    return {
        "model": "good-0",
        "engine": kind,
        "replicas": {
            "min": min(minimum, maximum),
            "max": maximum,
            "standby": min(random.choice((0, 0, 1, 2)), maximum),
        },
        "scaling": {
            "down_after_s": random.choice((1.0, 5.0, 20.0)),
            "idle_to_zero_s": random.choice((5.0, 30.0)),
        },
        "rollout": {
            "surge": random.choice((0, 1, 1, 2)),
            "traffic": random.choice(([1.0], [0.5, 1.0], [0.1, 0.5, 1.0])),
            "min_requests": random.choice((0, 2, 20)),
            "stage_s": random.choice((1.0, 10.0)),
            "start_limit_s": random.choice((15.0, 60.0)),
        },
        "native": {
            "max_running": random.choice((2, 4) if is_native else (2, 4, 16)),
            "token_budget": random.choice((32, 128)),
            "block_size": 16,
            "max_context_tokens": 1024,
            "kv_cache_mb": random.choice((1, 2, 4)),  # of the simulated engine: 64 blocks each
        },
        "simulated": {
            "step_ms": random.choice((30.0, 100.0, 200.0)),
            "prefill_ms_per_token": random.choice((0.0, 0.2)),
        },
        "queue": {"max_requests": random.choice((4, 64)), "max_wait_s": random.choice((10.0, 40.0))},
        "max_open": random.choice((2, 8, 64)),
        "drain_grace_s": random.choice((0.0, 2.0, 20.0)),
        "placement": random.choice(("prefix", "prefix", "least_loaded", "round_robin")),
        "streams": {
            "resume_attempts": random.choice((0, 2, 3, 3)),
            "resume_limit_s": random.choice((5.0, 20.0)),
            "handover_after_s": random.choice((0.0, 1.0)),
        },
    }


def _draw_clients(random: Random, config: Config, ends_s: float) -> tuple[ClientPlan, ...]:
    """Arrivals in bursts of a Poisson process, from the first moment on."""
    total = random.choice((8, 20, 20, 60))
    endpoints, tenants = list(config.endpoints), list(config.tenants) or [""]
    num_families = random.randint(1, 5)
    plans: list[ClientPlan] = []
    now_s = random.uniform(0.0, 8.0)
    rate = total / ends_s
    while now_s < ends_s and len(plans) < 8 * total:
        question = Question(
            make_prompt(random, num_families),
            random.choice((1, 4, 12, 40, 100)),
            random.randrange(1 << 30),
            random.choice(("", "", "s1", "s2")),
        )
        leaves = random.uniform(0.0, 6.0) if random.random() < 0.15 else None
        plans.append(
            ClientPlan(len(plans), now_s, random.choice(endpoints), random.choice(tenants), question, leaves)
        )
        # Some come together, others after a long quiet.
        now_s += random.expovariate(rate * random.choice((0.5, 1.0, 8.0, 40.0)))
    return tuple(plans)


def _draw_faults(random: Random, ends_s: float, config: Config) -> tuple[Fault, ...]:
    mean_gap_s = random.choice((3.0, 8.0, 25.0))
    # Of a seed's own choice of kinds, so that some meet the same fault again and again.
    kinds = random.sample(list(WEIGHTS), k=random.choice((2, 5, len(WEIGHTS))))
    weights = [WEIGHTS[kind] for kind in kinds]
    faults, now_s = [], CALM_S * random.random() + random.expovariate(1 / mean_gap_s)
    while now_s < ends_s:
        kind = random.choices(kinds, weights)[0]
        duration_s = 0.0
        if kind in PAUSES:
            duration_s = _draw_pause_s(random)
        elif kind in ("network slow", "reports doubled"):
            duration_s = random.uniform(1.0, 15.0)
        faults.append(Fault(now_s, kind, random.random(), duration_s, random.random()))
        now_s += random.expovariate(1 / mean_gap_s) if random.random() < 0.8 else random.uniform(0.0, 0.2)
    return tuple(faults)


def _draw_pause_s(random: Random) -> float:
    return random.choice((0.2, 1.0, 4.0, 16.0)) * random.uniform(0.5, 1.5)


def _with_durable(random: Random, config: Config) -> Config:
    """Let the endpoints of some seeds be durable, as far as their streams may be continued."""
    if random.random() >= DURABLE_RATIO:
        return config
    num_fronts = random.choice((1, 1, 2))
    change = {"durable": True, "durable_fronts": num_fronts}
    endpoints = {
        name: endpoint.model_copy(update={"streams": endpoint.streams.model_copy(update=change)})
        if endpoint.streams.resume_attempts
        else endpoint
        for name, endpoint in config.endpoints.items()
    }
    return config.model_copy(update={"endpoints": endpoints})


def _with_extras(
    random: Random, faults: tuple[Fault, ...], ends_s: float, config: Config
) -> tuple[Fault, ...]:
    """Add what only some worlds have something to break of: durable streams, and requests in relays."""
    more: list[Fault] = []
    if any(endpoint.streams.durable for endpoint in config.endpoints.values()):
        # Some lose replicas alone: there, no stream may be cut.
        kinds = random.choice((DURABLE_KINDS, DURABLE_KINDS[:5]))
        for _ in range(random.choice((0, 2, 8))):
            kind = random.choice(kinds)
            pause_s = _draw_pause_s(random) if kind in PAUSES else 0.0
            more.append(
                Fault(random.uniform(0.3, 1.0) * ends_s, kind, random.random(), pause_s, random.random())
            )
        if random.random() < 0.5:
            faults = ()
    if random.random() < RELAY_RATIO:
        more += [
            Fault(random.uniform(0.1, 1.0) * ends_s, "relay killed", random.random())
            for _ in range(random.randint(1, 3))
        ]
    if random.random() < REFUSAL_RATIO:
        more += _draw_refusals(random, ends_s)
    return tuple(sorted((*faults, *more), key=lambda fault: fault.at_s)) if more else faults


def _draw_refusals(random: Random, ends_s: float) -> list[Fault]:
    """Several fronts that refuse at a time, from the first moments on, when streams wait in relays."""
    faults: list[Fault] = []
    for _ in range(random.choice((1, 3, 6))):
        at_s = random.uniform(0.0, 0.9) * ends_s
        faults += [
            Fault(at_s + random.uniform(0.0, 2.0), "front refuses", random.random(), random.uniform(0.5, 8.0))
            for _ in range(random.randint(1, 4))
        ]
    return faults
