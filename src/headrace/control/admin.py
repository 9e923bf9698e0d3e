"""Asks a running controller: what `headrace status` and `System.status()` stand on.

Owns one short connection per question, blocking or not. Must not know: what answers mean.
"""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path

from headrace.api.framing import FrameDecoder, encode_frame
from headrace.api.messages import AdminCommand, AdminReply
from headrace.control.specs import ADMIN_SOCKET
from headrace.errors import HeadraceError

ANSWER_LIMIT_S = 10.0
_READ_BYTES = 65536


class NotRunning(HeadraceError):
    """No controller answers: the system is not running, or its controller is just being restarted."""


class NoAnswer(NotRunning):
    """The controller was asked and did not answer: nobody knows whether the command was carried out."""


class CommandRefused(HeadraceError):
    """The controller did not carry the command out; the message says why."""


def ask(run_directory: Path, command: AdminCommand, limit_s: float = ANSWER_LIMIT_S) -> AdminReply:
    """Send a command and wait for its reply. Raises NotRunning or CommandRefused."""
    decoder: FrameDecoder[AdminReply] = FrameDecoder(AdminReply)
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(limit_s)
            connection.connect(str(run_directory / ADMIN_SOCKET))
            connection.sendall(encode_frame(command))
            while data := connection.recv(_READ_BYTES):
                for reply in decoder.feed(data):
                    return checked_reply(reply)
    except OSError as error:
        raise _not_running(run_directory, error) from None
    raise NoAnswer(f"the controller of {run_directory} closed the connection without an answer; try again")


async def ask_async(
    run_directory: Path, command: AdminCommand, limit_s: float = ANSWER_LIMIT_S
) -> AdminReply:
    """Like `ask`, inside an event loop."""
    decoder: FrameDecoder[AdminReply] = FrameDecoder(AdminReply)
    try:
        async with asyncio.timeout(limit_s):
            reader, writer = await asyncio.open_unix_connection(str(run_directory / ADMIN_SOCKET))
            try:
                writer.write(encode_frame(command))
                while data := await reader.read(_READ_BYTES):
                    for reply in decoder.feed(data):
                        return checked_reply(reply)
            finally:
                writer.transport.abort()
    except OSError as error:  # TimeoutError is one
        raise _not_running(run_directory, error) from None
    raise NoAnswer(f"the controller of {run_directory} closed the connection without an answer; try again")


def checked_reply(reply: AdminReply) -> AdminReply:
    """Return `reply`. Raises CommandRefused if it says so."""
    if reply.error:
        raise CommandRefused(reply.error)
    return reply


def _not_running(run_directory: Path, error: OSError) -> NotRunning:
    if isinstance(error, TimeoutError):
        return NoAnswer(f"the controller of {run_directory} does not answer; see {run_directory}/logs")
    if isinstance(error, ConnectionResetError | BrokenPipeError):
        return NoAnswer(f"the controller of {run_directory} ended while it was asked; try again in a second")
    if not run_directory.is_dir():
        return NotRunning(
            f"no system called {run_directory.name!r} is running. Start it with: headrace up CONFIG.yaml"
        )
    return NotRunning(
        f"the controller of {run_directory} is not there right now ({error.strerror}); try again in a second"
    )
