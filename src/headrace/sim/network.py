"""Connections between processes: ordered, delayed, and cut.

Within one connection messages keep their order, as a stream's do; between connections nothing is promised.
Owns delays, cuts and stalls. Must not know what messages mean; they are handed over as they are, since all
of them are frozen.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from headrace.sim.machine import Host, Process, Registry

MAX_UNREAD = 512
"""Messages in a socket's buffer; a sender of more has waited too long for its reader."""
CONNECT_LIMIT_S = 1.0
"""Longest wait for a connection to a machine that cannot be reached: HAProxy's `timeout connect`."""
OnMessage = Callable[[Any], None]
OnClose = Callable[[], None]


class Weather:
    """How fast messages travel now; faults change it."""

    def __init__(self) -> None:
        self.latency_s = 0.0003
        self.duplicate_ratio = 0.0
        """Of load reports: sent twice."""
        self._cut_off_until_s: dict[Host, float] = {}

    def cut_off(self, host: Host, until_s: float) -> None:
        """Let nothing travel between `host` and other machines until then, in true time."""
        self._cut_off_until_s[host] = until_s

    def unreachable_s(self, one: Host, other: Host, now_s: float) -> float:
        """Return how long nothing travels between two machines."""
        if one is other:
            return 0.0
        until_s = [self._cut_off_until_s.get(host, now_s) for host in (one, other)]
        return max(0.0, *(moment - now_s for moment in until_s))


class End:
    """One process's end of a connection. Set `on_message` and `on_close` when it is made."""

    def __init__(self, process: Process, connection: Connection) -> None:
        self.process = process
        self.connection = connection
        self.on_message: OnMessage = _ignore
        self.on_close: OnClose = _do_nothing
        self.is_open = True
        self.num_unread = 0
        """Sent to it and not read yet."""
        self.arrival_s = 0.0
        """When the last message sent to it arrives: none may overtake it."""

    @property
    def peer(self) -> End:
        ends = self.connection.ends
        return ends[1] if ends[0] is self else ends[0]

    def send(self, message: object) -> None:
        """Send, unless the connection is known to be closed here."""
        if self.is_open:
            self.connection.carry(self.peer, message)

    def close(self) -> None:
        """Close it; the other side reads what was sent, then hears of it."""
        if self.is_open:
            self.is_open = False
            self.process.held.pop(self.connection, None)
            self.connection.carry_close(self.peer)


class Connection:
    """A stream between two processes."""

    def __init__(self, registry: Registry, weather: Weather, client: Process, server: Process) -> None:
        self._registry = registry
        self._weather = weather
        self._random = client.random
        self._is_cut = False
        self._stalled_until_s = 0.0
        self.ends = (End(client, self), End(server, self))
        client.held[self] = None
        server.held[self] = None

    def __repr__(self) -> str:
        return f"<Connection {self.ends[0].process.name} to {self.ends[1].process.name}>"

    def carry(self, to: End, message: object) -> None:
        if self._is_cut:
            return
        to.num_unread += 1
        self._schedule(to, partial(self._deliver, to, message), "message")

    def carry_close(self, to: End) -> None:
        if not self._is_cut:
            self._schedule(to, partial(_hear_close, to), "close")

    def stall(self, seconds: float) -> None:
        """Nothing travels for a while; what is sent meanwhile arrives afterwards."""
        self._stalled_until_s = self._registry.timeline.now_s + seconds

    def cut(self, delays_s: tuple[float, float]) -> None:
        """Lose what is under way; each side hears of the reset after its own delay."""
        if self._is_cut:
            return
        self._is_cut = True
        for end, delay_s in zip(self.ends, delays_s, strict=True):
            end.process.after(delay_s, partial(_hear_close, end), "close")

    def owner_died(self, process: Process) -> None:
        """The kernel closes a dead process's end."""
        for end in self.ends:
            if end.process is process:
                end.close()

    def _schedule(self, to: End, call: Callable[[], None], kind: str) -> None:
        timeline = self._registry.timeline
        delay_s = self._weather.latency_s * self._random.uniform(0.5, 2.0)
        when_s = max(timeline.now_s + delay_s, self._stalled_until_s, to.arrival_s)
        to.arrival_s = when_s
        timeline.at(when_s, partial(to.process.run, call), kind)

    def _deliver(self, to: End, message: object) -> None:
        to.num_unread -= 1
        if to.is_open and not self._is_cut:
            to.on_message(message)


def connect(
    client: Process,
    weather: Weather,
    address: str,
    on_connected: Callable[[End], None],
    on_refused: Callable[[], None],
) -> None:
    """Connect to whoever listens at `address` in a moment. A stopped process's kernel accepts, too. A machine
    that is cut off is tried until it is reached, or the limit is over."""
    registry = client.registry

    def arrive() -> None:
        server = registry.listeners.get(address)
        if server is None or not server.is_alive:
            on_refused()
            return
        if not (client.is_outside or server.is_outside):
            wait_s = weather.unreachable_s(client.host, server.host, registry.timeline.now_s)
            if wait_s > CONNECT_LIMIT_S:
                client.after(CONNECT_LIMIT_S, on_refused, "connect")
                return
            if wait_s > 0:
                client.after(wait_s, arrive, "connect")
                return
        connection = Connection(registry, weather, client, server)
        # Told in the order of a stream: the acceptance is the first thing that the server reads.
        far = connection.ends[1]
        connection._schedule(far, lambda: server.accept(address, far), "accept")
        on_connected(connection.ends[0])

    client.after(weather.latency_s, arrive, "connect")


def _hear_close(end: End) -> None:
    if end.is_open:
        end.is_open = False
        end.process.held.pop(end.connection, None)
        end.on_close()


def _ignore(message: object) -> None:
    pass


def _do_nothing() -> None:
    pass
