"""An event loop of one simulated process, so that the product's own coroutines run on virtual time.

Owns the little of asyncio's loop that timers, tasks and UNIX connections need. There is nothing to run: the
timeline is the loop. Must not know what the coroutines do.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextvars import Context, copy_context
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from headrace.sim.network import End, Weather, connect

if TYPE_CHECKING:
    from headrace.sim.machine import Process
    from headrace.sim.timeline import Timer


class LoopTimer(asyncio.TimerHandle):
    """A callback to come."""

    def __init__(self, when_s: float, callback: Callable[..., object], args: Any, loop: ProcessLoop) -> None:
        super().__init__(when_s, callback, args, loop.as_loop())
        self.timer: Timer | None = None

    def cancel(self) -> None:
        if self.timer is not None:
            self.timer.cancel()
        super().cancel()


class ProcessLoop:
    """The running loop while one process does something: what of asyncio's loop is used here, no more."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self.weather = Weather()

    def as_loop(self) -> asyncio.AbstractEventLoop:
        """Itself, for those who ask for a whole loop."""
        return cast(asyncio.AbstractEventLoop, self)

    def time(self) -> float:
        return self._process.host.now_s()

    def get_debug(self) -> bool:
        return False

    def is_running(self) -> bool:
        return True

    def is_closed(self) -> bool:
        return False

    def call_soon(
        self, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> asyncio.Handle:
        return self._schedule(0.0, callback, args, context)

    def call_later(
        self, delay: float, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> asyncio.TimerHandle:
        return self._schedule(delay, callback, args, context)

    def call_at(
        self, when: float, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> asyncio.TimerHandle:
        return self._schedule(when - self.time(), callback, args, context)

    def _schedule(
        self, delay_s: float, callback: Callable[..., object], args: Any, context: Context | None
    ) -> LoopTimer:
        context = context or copy_context()
        handle = LoopTimer(self.time() + delay_s, callback, args, self)
        handle.timer = self._process.after(
            max(0.0, delay_s), partial(context.run, callback, *args), "coroutine"
        )
        return handle

    def create_future(self) -> asyncio.Future[Any]:
        return asyncio.Future(loop=self.as_loop())

    def create_task(self, coro: Any, *, name: str | None = None, context: Any = None) -> asyncio.Task[Any]:
        return asyncio.Task(coro, loop=self.as_loop(), name=name)

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        """An exception that nobody took. Tasks of dead processes are no news."""
        error = context.get("exception")
        if error is not None and self._process.is_alive:
            self._process.registry.errors.append(error)

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        pass

    async def create_unix_connection(
        self, protocol_factory: Callable[[], asyncio.BaseProtocol], path: str | None = None, **_: Any
    ) -> tuple[Any, Any]:
        """Connect to a listener of this world. Raises ConnectionRefusedError."""
        assert path is not None
        connected: asyncio.Future[End] = self.create_future()

        def refuse() -> None:
            if not connected.done():
                connected.set_exception(ConnectionRefusedError(f"nobody listens at {path}"))

        def take(end: End) -> None:
            if connected.done():
                end.close()
            else:
                connected.set_result(end)

        connect(self._process, self.weather, path, take, refuse)
        end = await connected
        protocol = protocol_factory()
        return Pipe(end, protocol), protocol


class Pipe(asyncio.Transport):
    """A transport over one end of a connection: bytes as they are written, in their order."""

    def __init__(self, end: End, protocol: asyncio.BaseProtocol) -> None:
        super().__init__()
        assert isinstance(protocol, asyncio.Protocol)
        self._end = end
        self._protocol = protocol
        end.on_message = protocol.data_received
        end.on_close = self._on_close
        protocol.connection_made(self)

    def write(self, data: Any) -> None:
        self._end.send(bytes(data))

    def get_write_buffer_size(self) -> int:
        return 64 * self._end.peer.num_unread

    def is_closing(self) -> bool:
        return not self._end.is_open

    def close(self) -> None:
        if self._end.is_open:
            self._end.close()
            self._end.process.after(0.0, self._on_close, "close")

    def abort(self) -> None:
        self.close()

    def _on_close(self) -> None:
        self._protocol.connection_lost(None)
