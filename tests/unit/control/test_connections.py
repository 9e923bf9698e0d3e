"""What fronts are told of their end, once each."""

from __future__ import annotations

from typing import Any, cast

from headrace.api.messages import LeaveBy
from headrace.control.connections import Connections
from headrace.fabric.channel import Channel


class Told:
    """A channel that keeps what is sent."""

    def __init__(self) -> None:
        self.messages: list[Any] = []

    def send(self, message: Any) -> None:
        self.messages.append(message)


def test_a_front_is_told_once_by_when_it_leaves_and_again_on_a_new_connection_or_deadline() -> None:
    connections, first, second = Connections(), Told(), Told()
    connections.send_leaving({"chat-1": 160.0}, 100.0)  # not connected yet
    connections.add_front("chat-1", cast(Channel, first))
    connections.add_front("chat-2", cast(Channel, second))
    for now_s in (101.0, 102.0):
        connections.send_leaving({"chat-1": 160.0}, now_s)
    assert (first.messages, second.messages) == ([LeaveBy(59.0)], [])
    connections.send_leaving({"chat-1": 150.0}, 103.0)
    assert first.messages[1:] == [LeaveBy(47.0)]
    again = Told()
    connections.add_front("chat-1", cast(Channel, again))
    connections.send_leaving({"chat-1": 150.0}, 104.0)
    assert again.messages == [LeaveBy(46.0)]
