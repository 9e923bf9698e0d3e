"""The two kinds of struct that all messages are made of, and the words that several of them use."""

from __future__ import annotations

from enum import StrEnum
from typing import Protocol

import msgspec

PROTOCOL_VERSION = 1


class TerminalState(StrEnum):
    """How a request ended. Every accepted request ends in exactly one of these."""

    FINISHED = "finished"
    """The whole answer was sent."""
    ABORTED = "aborted"
    """The client left."""
    REFUSED = "refused"
    """Admission or validation said no."""
    FAILED = "failed"
    """It was accepted, and something of ours broke."""


class Message(msgspec.Struct, frozen=True, omit_defaults=True, tag=True):
    """Base of messages that travel in a union; the tag is the class name."""


class Record(msgspec.Struct, frozen=True, array_like=True):
    """Base of parts that are inside a message. Positional on the wire: append fields, never reorder them."""


class ProcessOfNode(Protocol):
    """What tells a process from all others of a cluster: pids of different nodes may coincide."""

    @property
    def pid(self) -> int: ...
    @property
    def node_address(self) -> str:
        """Empty: not known."""
        ...


def is_same_process(one: ProcessOfNode, other: ProcessOfNode) -> bool:
    """Compare pids and nodes. A node that is not known is no difference."""
    if one.pid != other.pid:
        return False
    return one.node_address == other.node_address or not (one.node_address and other.node_address)
