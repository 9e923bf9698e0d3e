"""The grammar worker: a process that compiles grammars for a front, so that a hostile one harms nothing else.

Each task has so much CPU time, and the process so much memory; past either, the kernel ends it, and the front
starts another. Reads tasks from stdin, writes verdicts to stdout. Must not know HTTP or engines.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
import threading

from headrace.api.framing import FrameDecoder, encode_frame
from headrace.lifetime import die_with_parent
from headrace.replica.grammar_messages import GrammarTask, GrammarVerdict

CPU_LIMIT_S = 0.8
MEMORY_LIMIT_BYTES = 1 << 30
_STACK_BYTES = 4 << 20
"""Half of what the engine's thread has: a grammar that nests deep enough to break it must break here."""


def answer(task: GrammarTask) -> GrammarVerdict:
    """Return the grammar that the task asks for, or what is wrong with it."""
    from headrace.replica.grammar_text import GrammarError, write_grammar

    # The signal's default action ends the process. No handler could: the library does not return to Python.
    signal.setitimer(signal.ITIMER_PROF, CPU_LIMIT_S)
    try:
        return GrammarVerdict(grammar=write_grammar(task.kind, task.text))
    except GrammarError as error:
        return GrammarVerdict(error=str(error))
    except RecursionError:
        return GrammarVerdict(error="it is nested too deeply")
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0.0)


def serve() -> None:
    """Answer tasks until stdin ends."""
    import headrace.replica.grammar_text  # noqa: F401  (loaded before the first task's clock runs)

    decoder: FrameDecoder[GrammarTask] = FrameDecoder(GrammarTask)
    while data := os.read(0, 65536):
        for task in decoder.feed(data):
            reply = encode_frame(answer(task))
            while reply:
                reply = reply[os.write(1, reply) :]


def main() -> int:
    """Run the worker to its end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group, and the front decides
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    die_with_parent()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT_BYTES, MEMORY_LIMIT_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    from setproctitle import setproctitle

    setproctitle(" ".join(sys.argv[1:]) or "headrace: grammars")
    threading.stack_size(_STACK_BYTES)
    thread = threading.Thread(target=serve, name="grammars")
    thread.start()
    thread.join()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
