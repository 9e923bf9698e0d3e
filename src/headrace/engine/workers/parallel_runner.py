"""The ModelRunner of an engine with several ranks: posts each step to the others, and computes rank 0's part.

Must not know requests, or how ranks are started.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from torch import Tensor

from headrace.api.messages import EngineSpec
from headrace.engine.model_files.resolve import ModelFiles
from headrace.engine.protocol import StepInput
from headrace.engine.runner import DecoderRunner, load_runner
from headrace.engine.workers.group import WorkerGroup
from headrace.engine.workers.mailbox import Command
from headrace.errors import EngineDead, OutOfMemory


class ParallelRunner:
    """Rank 0's runner and the group of the others. One caller, one thread."""

    def __init__(self, runner: DecoderRunner, group: WorkerGroup) -> None:
        self._runner = runner
        self._group = group
        self._sleep_level: Literal[0, 1, 2] = 0
        self.vocab_size = runner.vocab_size
        self.max_context_tokens = runner.max_context_tokens
        self.block_size = runner.block_size
        self.num_blocks = runner.num_blocks
        self.eos_token_ids = runner.eos_token_ids
        self.architecture = runner.architecture
        self.path = f"{runner.path} in each of {group.num_ranks} ranks{' over TCP' * group.is_linked}"
        self.team = runner.team
        self.kv_file = runner.kv_file

    def __repr__(self) -> str:
        return f"<ParallelRunner {self._runner!r}, {self._group!r}>"

    def execute(self, batch: StepInput) -> Tensor:
        try:
            return self._runner.execute(self._group.post_step(batch))
        except EngineDead as error:
            raise self._group.explain(error) from error

    def check_health(self) -> None:
        self._group.check()

    def sleep(self, level: Literal[1, 2]) -> None:
        self._sleep(level)
        self._sleep_level = level

    def wake(self) -> None:
        """All ranks wake or none: when one cannot, the others sleep again."""
        self._group.post(Command.WAKE)
        own_error: Exception | None = None
        try:
            self._runner.wake()
        except Exception as error:  # whatever it is, the other ranks' answers must be taken
            own_error = error
        errors = self._group.wait_changed()
        if own_error is None and not errors:
            self._sleep_level = 0
            return
        self._sleep(2 if self._sleep_level == 2 else 1)
        if own_error is not None:
            raise own_error
        raise OutOfMemory(errors)

    def _sleep(self, level: Literal[1, 2]) -> None:
        self._group.post(Command.SLEEP_1 if level == 1 else Command.SLEEP_2)
        self._runner.sleep(level)
        if errors := self._group.wait_changed():
            raise EngineDead(f"ranks cannot sleep: {errors}")


def load_any_runner(
    spec: EngineSpec, files: ModelFiles, on_phase: Callable[[str], None], group: WorkerGroup | None
) -> DecoderRunner | ParallelRunner:
    """Load the whole model; or, with `group`, rank 0's part while the others load theirs. Raises as
    `load_runner`, and what a rank raised."""
    if group is None:
        return load_runner(spec, files, on_phase)

    def begin(phase: str) -> None:
        group.check()
        on_phase(phase)

    try:
        runner = load_runner(spec, files, begin, group)
        on_phase("waiting for the other ranks")
        group.wait_ready(runner.path)
    except EngineDead as error:
        raise group.explain(error) from error
    return ParallelRunner(runner, group)
