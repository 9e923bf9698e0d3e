"""vLLM's executor for CPUs, whose engine core sleeps while its workers compute.

vLLM's own looks for the workers' answer again and again for a second after the last one. Steps on CPUs take
tens of milliseconds, and its worker threads are pinned: the core that it looks from is one of theirs.

Owns nothing of the waiting itself, which is vLLM's: its queues know how to sleep until they are told, and do
after that second. Runs in the engine core's process. Imported by vLLM, by its name, and by nobody else.
"""

from __future__ import annotations

from vllm.v1.executor.multiproc_executor import MultiprocExecutor


class SleepingExecutor(MultiprocExecutor):  # type: ignore[misc]  # vLLM is not there when types are checked
    """As the one it inherits from, but for how it waits."""

    def _post_init_executor(self) -> None:
        super()._post_init_executor()
        for queue in self.response_mqs:
            if queue._spin_condition is not None:  # another host's has none: its socket is waited for
                queue._spin_condition.busy_loop_s = 0.0
