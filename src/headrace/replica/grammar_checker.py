"""Turns what an answer must match into a grammar for the engine, or into an error for the client.

Owns the grammar worker's process, its time limit, and a cache of verdicts. The front's event loop never
waits: the work is done in the worker, which dies of a grammar that is too much for it.
Must not know requests or what a grammar says.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
from asyncio.subprocess import PIPE, Process
from collections import OrderedDict
from hashlib import blake2b

from headrace.api.framing import FrameDecoder, encode_frame
from headrace.errors import InvalidRequest, Overloaded, ProtocolError
from headrace.replica.grammar_messages import GrammarTask, GrammarVerdict
from headrace.replica.structured_output import OutputForm

MAX_WAITING = 64
"""Requests that wait for the worker; each may take it most of a second."""
_WAIT_LIMIT_S = 20.0
_WORK_LIMIT_S = 10.0
"""Of one task, its process's start included. The task's CPU time is limited by the worker itself, so this
much means a machine that has no time for it."""
_CACHE_BYTES = 8 << 20
_CACHE_ENTRY_BYTES = 256
_READ_BYTES = 1 << 16


class GrammarChecker:
    """Compiles one grammar at a time; others wait their turn."""

    def __init__(self, title: str = "headrace: grammars") -> None:
        self._title = title
        self._process: Process | None = None
        self._decoder: FrameDecoder[GrammarVerdict] = FrameDecoder(GrammarVerdict)
        self._turn = asyncio.Lock()
        self._num_waiting = 0
        self._verdicts: OrderedDict[bytes, GrammarVerdict] = OrderedDict()
        """Least recently used first. Errors too: a hostile grammar costs its time once."""
        self._cached_bytes = 0
        self.num_compiled = 0
        """Grammars that the worker was asked for."""

    def __repr__(self) -> str:
        return f"<GrammarChecker {len(self._verdicts)} cached, {self._num_waiting} waiting>"

    async def compile(self, form: OutputForm) -> str:
        """Return the grammar of `form`. Raises InvalidRequest if it does not compile within the limits, and
        Overloaded if there is no time to find out."""
        key = blake2b(f"{form.kind} {form.text}".encode(), digest_size=16).digest()
        verdict = self._verdicts.get(key)
        if verdict is None:
            verdict = await self._in_turn(GrammarTask(form.kind, form.text), key)
        else:
            self._verdicts.move_to_end(key)
        if verdict.error:
            code = "invalid_json_schema" if form.kind == "json" else "invalid_value"
            raise InvalidRequest(f"{form.param}: {verdict.error}", param=form.param, code=code)
        return verdict.grammar

    async def close(self) -> None:
        """End the worker."""
        await self._kill()

    async def _in_turn(self, task: GrammarTask, key: bytes) -> GrammarVerdict:
        if self._num_waiting >= MAX_WAITING:
            raise _no_time(f"{MAX_WAITING} requests wait for their grammars to be compiled")
        self._num_waiting += 1
        try:
            async with asyncio.timeout(_WAIT_LIMIT_S), self._turn:
                verdict = self._verdicts.get(key)  # another request may have asked for the same
                return verdict or await self._work(task, key)
        except TimeoutError:
            raise _no_time("the grammar could not be compiled in time") from None
        finally:
            self._num_waiting -= 1

    async def _work(self, task: GrammarTask, key: bytes) -> GrammarVerdict:
        self.num_compiled += 1
        try:
            async with asyncio.timeout(_WORK_LIMIT_S):
                verdict = await self._ask(task)
        except BaseException:
            # Also when the wait was cancelled: the next task must not get this one's verdict.
            await self._kill()
            raise
        self._keep(key, verdict)
        return verdict

    async def _ask(self, task: GrammarTask) -> GrammarVerdict:
        process = self._process
        if process is None or process.returncode is not None:
            process = await self._start()
        assert process.stdin is not None
        assert process.stdout is not None
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # its end is noticed below
            process.stdin.write(encode_frame(task))
            await process.stdin.drain()
        while data := await process.stdout.read(_READ_BYTES):
            for verdict in self._decoder.feed(data):
                return verdict
        return await self._explain_end(process)

    async def _start(self) -> Process:
        try:
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "headrace.replica.grammar_worker", self._title),
                stdin=PIPE,
                stdout=PIPE,
            )
        except OSError as error:
            raise _no_time(f"the process that compiles grammars could not be started: {error}") from error
        self._decoder = FrameDecoder(GrammarVerdict)
        return self._process

    async def _explain_end(self, process: Process) -> GrammarVerdict:
        status = await process.wait()
        self._process = None
        if status == -signal.SIGPROF:
            return GrammarVerdict(error="it takes too long to compile; make it smaller or less ambiguous")
        if status in (-signal.SIGABRT, -signal.SIGSEGV, -signal.SIGBUS, -signal.SIGILL):
            return GrammarVerdict(error="it takes too much memory to compile; make it smaller")
        raise ProtocolError(f"the process that compiles grammars ended with status {status}; see the log")

    async def _kill(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(1.0):
                await process.wait()

    def _keep(self, key: bytes, verdict: GrammarVerdict) -> None:
        self._verdicts[key] = verdict
        self._cached_bytes += _size(verdict)
        while self._cached_bytes > _CACHE_BYTES:
            _, forgotten = self._verdicts.popitem(last=False)
            self._cached_bytes -= _size(forgotten)


def _size(verdict: GrammarVerdict) -> int:
    # Up to four bytes per character, but text is mostly ASCII and kept with one.
    return _CACHE_ENTRY_BYTES + len(verdict.grammar) + len(verdict.error)


def _no_time(what: str) -> Overloaded:
    return Overloaded(f"{what}; send the request again", retry_after_s=1.0)
