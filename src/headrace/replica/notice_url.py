"""An address that says whether this machine is about to go away: what clouds call instance metadata.

Owns asking it and what its answers mean. Must not know what follows from a notice.

`http.client` in a thread of its own: it and ssl are in a front's memory anyway, where httpx would add 10 MiB
to each; a thread that hangs (in a name's look-up, on a server that answers byte by byte) delays neither
streams nor the front's end, and no second one is started beside it.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import logging
import math
import socket
import ssl
import threading
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import msgspec

from headrace.replica.notice import Notice

ASK_LIMIT_S = 2.0
"""For one answer, from the look-up of the name to the last byte."""
MAX_BYTES = 64 * 1024
_log = logging.getLogger(__name__)


class Silence(NamedTuple):
    """No answer that says yes or no; nothing follows from it but a line in the log."""

    reason: str


def read_answer(status: int, body: bytes) -> Notice | Silence | None:
    """Return what an answer means: a notice, nothing known, or (None) that the machine stays."""
    if status == 404:
        return None
    if status != 200:
        return Silence(f"it answers with status {status}")
    if len(body) > MAX_BYTES:
        return Silence(f"its answer is longer than {MAX_BYTES >> 10} KiB")
    word = body.strip().upper()
    if word in (b"FALSE", b"NONE"):
        return None
    if word == b"TRUE":
        return Notice(None)
    try:
        content = msgspec.json.decode(body)
    except (msgspec.DecodeError, RecursionError):
        content = None
    if isinstance(content, dict) and ("deadline_s" in content or "time" in content):
        return Notice(_deadline_of(content))
    return Silence("its answer is neither TRUE, FALSE, NONE nor JSON with deadline_s or time")


def _deadline_of(content: dict[str, Any]) -> float | None:
    """Return the deadline in seconds since 1970; None if what stands there is none."""
    deadline_s, time = content.get("deadline_s"), content.get("time")
    if isinstance(deadline_s, float | int) and not isinstance(deadline_s, bool):
        with contextlib.suppress(OverflowError):
            deadline_s = float(deadline_s)
            if math.isfinite(deadline_s) and deadline_s >= 0:
                return deadline_s
    if isinstance(time, str):
        with contextlib.suppress(ValueError, OverflowError):
            moment = datetime.fromisoformat(time)
            return max(0.0, (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp())
    return None


class NoticeUrl:
    """One address. It is asked for a notice at each look; that nothing is heard is logged when it changes."""

    def __init__(self, url: str, headers: Mapping[str, str], limit_s: float = ASK_LIMIT_S) -> None:
        """url: http or https, with a host, as the config checked it."""
        parts = urlsplit(url)
        self.name = f"{parts.scheme}://{parts.netloc}{parts.path}"  # a query may hold what logs must not
        self._url = url
        self._headers = dict(headers)
        self._limit_s = limit_s
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._question: _Question | None = None
        self._silence = ""

    def __repr__(self) -> str:
        return f"NoticeUrl({self.name}{', silent: ' + self._silence if self._silence else ''})"

    async def look(self) -> Notice | None:
        """Ask once. A question that hangs is given up after its limit; while its thread cannot be ended no
        other is asked."""
        if self._question is None:
            self._question = _Question(self._url, self._headers, self._tls, self._limit_s)
        await asyncio.wait([self._question.answer], timeout=self._limit_s)
        if not self._question.answer.done():
            self._question.cut()
            self._note_silence(f"no answer within {self._limit_s:g} s")
            return None
        answer = self._question.answer.result()
        is_late = self._question.is_cut
        self._question = None
        if is_late:  # what it then says is the end of its cut connection
            return None
        if isinstance(answer, Silence):
            self._note_silence(answer.reason)
            return None
        self._note_silence("")
        return answer

    def _note_silence(self, reason: str) -> None:
        if reason == self._silence:
            return
        self._silence = reason
        if reason:
            _log.warning("notice: nothing is heard of %s: %s", self.name, reason)
        else:
            _log.warning("notice: %s answers again", self.name)


class _Question:
    """One request in one thread. `answer` is always given at last, by whatever ends the thread."""

    def __init__(
        self, url: str, headers: Mapping[str, str], tls: ssl.SSLContext | None, limit_s: float
    ) -> None:
        self._url = url
        self._headers = headers
        self._tls = tls
        self._limit_s = limit_s
        self._loop = asyncio.get_running_loop()
        self._socket: socket.socket | None = None
        self.is_cut = False
        self.answer: asyncio.Future[Notice | Silence | None] = self._loop.create_future()
        # A daemon: the front's end does not wait for it.
        threading.Thread(target=self._run, name="notice-url", daemon=True).start()

    def cut(self) -> None:
        """End it where it waits for its server; may be called again."""
        self.is_cut = True
        if self._socket is not None:
            with contextlib.suppress(OSError):
                # The plain method: that of an SSLSocket takes away what the thread is reading from.
                socket.socket.shutdown(self._socket, socket.SHUT_RDWR)

    def _run(self) -> None:
        try:
            answer = self._ask()
        except ssl.SSLError as error:
            answer = Silence(f"TLS: {error.reason or type(error).__name__}")
        except TimeoutError:
            answer = Silence(f"no answer within {self._limit_s:g} s")
        except OSError as error:
            answer = Silence(error.strerror or type(error).__name__)
        except http.client.HTTPException as error:
            answer = Silence(f"what it answers is no HTTP ({type(error).__name__})")
        except Exception as error:
            answer = Silence(f"{type(error).__name__}: {error}")
        with contextlib.suppress(RuntimeError):  # the loop is closed: the front has ended
            self._loop.call_soon_threadsafe(self._give, answer)

    def _give(self, answer: Notice | Silence | None) -> None:
        if not self.answer.done():
            self.answer.set_result(answer)

    def _ask(self) -> Notice | Silence | None:
        """Follows no redirect and uses no proxy: what is configured is what is asked."""
        parts = urlsplit(self._url)
        host, default_port = parts.hostname or "", 443 if self._tls else 80
        connection = http.client.HTTPConnection(host, parts.port or default_port, timeout=self._limit_s)
        connection.default_port = default_port  # what the Host header leaves away
        plain = socket.create_connection((host, connection.port), timeout=self._limit_s)
        self._socket = plain
        try:
            if self._tls is not None:
                wrapped = self._tls.wrap_socket(plain, server_hostname=host, do_handshake_on_connect=False)
                self._socket = wrapped
                if not self.is_cut:
                    wrapped.do_handshake()
            if self.is_cut:  # while it was being connected
                raise TimeoutError
            connection.sock = self._socket
            target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
            connection.request("GET", target, headers={**self._headers, "Connection": "close"})
            answer = connection.getresponse()
            with answer:
                return read_answer(answer.status, answer.read(MAX_BYTES + 1))
        finally:
            connection.close()
            self._socket.close()
