"""`python -m headrace.control.serve_process`: the supervisor behind `headrace.serve`, in its own process.

stdin: one JSON line (ServeSpec), then open for as long as the caller lives. stdout: one line, ServeAnswer.
Must not know: the caller.
"""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

import msgspec

from headrace.api.config import Config
from headrace.control.hold import hold_system
from headrace.errors import HeadraceError
from headrace.fabric.supervisor import Supervisor

_PARENT_CHECK_S = 1.0


class ServeSpec(msgspec.Struct, frozen=True):
    config_json: str
    run_directory: str


class ServeAnswer(msgspec.Struct, frozen=True):
    error: str = ""


def main() -> int:
    stdin = sys.stdin.buffer
    spec = msgspec.json.decode(stdin.readline(), type=ServeSpec)
    parent = os.getppid()

    async def watch(supervisor: Supervisor, run_directory: Path) -> None:
        _answer(ServeAnswer())
        loop = asyncio.get_running_loop()
        gone = asyncio.Event()
        loop.add_reader(stdin.fileno(), gone.set)  # readable: end of file, the caller closed it or died
        try:
            while not gone.is_set() and os.getppid() == parent:
                try:
                    async with asyncio.timeout(_PARENT_CHECK_S):
                        await gone.wait()
                except TimeoutError:
                    pass
        finally:
            loop.remove_reader(stdin.fileno())
        supervisor.stop("the program that started this system is done")

    try:
        config = Config.model_validate_json(spec.config_json)
        hold_system(config, Path(spec.run_directory), watch, lambda notice: print(notice, file=sys.stderr))
    except (HeadraceError, OSError) as error:
        _answer(ServeAnswer(error=str(error)))
        return 1
    return 0


def _answer(answer: ServeAnswer) -> None:
    sys.stdout.buffer.write(msgspec.json.encode(answer) + b"\n")
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    sys.exit(main())
