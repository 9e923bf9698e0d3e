"""The sampler's arithmetic in one call of the compiled kernels, for all rows of a step.

Gives what `distribution` gives, token for token. Owns the tasks' memory. Must not know requests.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from headrace.api.messages import SamplingParams
from headrace.engine.operations.kernels import KernelsMissing, Library, Team, load_kernels

_MAX_TOP = 64
TASK = np.dtype(
    [
        ("logits", np.uint64),
        ("seed", np.uint64),
        ("index", np.int64),
        ("temperature", np.float64),
        ("top_p", np.float64),
        ("min_p", np.float64),
        ("top_k", np.int32),
        ("num_top", np.int32),
        ("mass", np.int64),
        ("highest", np.float32),
        ("token_id", np.int32),
    ],
    align=True,
)
"""The same fields in the same order as `SampleTask` in kernels/sampling.h."""
_MASK_64 = (1 << 64) - 1
_OUT_OF_MEMORY = -2

Task = tuple[int, int, int, float, float, float, int, int, int, float, int]


class Drawn(NamedTuple):
    """What came of one task. For its log-probabilities: the likeliest tokens' ids, the highest logit, and the
    mass at temperature 1, as `distribution.logprobs_of` takes them."""

    token_id: int
    """-1: the highest logit is not finite, or some logit is NaN."""
    top_ids: NDArray[np.int32]
    highest: float
    mass: int


def task(address: int, sampling: SamplingParams, index: int) -> Task:
    """Return the task of choosing the token at `index` of a generation from the logits at `address`."""
    return (
        address,
        sampling.seed & _MASK_64,
        index,
        sampling.temperature,
        sampling.top_p,
        sampling.min_p,
        sampling.top_k,
        sampling.num_logprobs,
        0,
        0.0,
        0,
    )


class FusedSampling:
    """The compiled sampler. One caller at a time."""

    def __init__(self, library: Library, team: Team | None = None) -> None:
        """`team`: the threads that share the rows; None: the caller alone. Raises KernelsMissing."""
        self._team = team
        pointer = ctypes.c_void_p
        self._function = library.function(
            "headrace_sample", [pointer, pointer, ctypes.c_int, ctypes.c_int, pointer]
        )
        self._reserve(64)

    def _reserve(self, num_tasks: int) -> None:
        self._tasks = np.zeros(num_tasks, TASK)
        self._top_ids = np.zeros((num_tasks, _MAX_TOP), np.int32)
        self._addresses = (self._tasks.ctypes.data, self._top_ids.ctypes.data)

    def choose(self, tasks: Sequence[Task], vocab_size: int) -> list[int]:
        """Return each task's token; -1 as in `Drawn`. The rows, `vocab_size` float32 each, stay as they are,
        and must live so long. Raises MemoryError."""
        num_tasks = len(tasks)
        if num_tasks > len(self._tasks):
            self._reserve(2 * num_tasks)
        self._tasks[:num_tasks] = tasks
        handle = None if self._team is None else self._team.handle
        self._function(handle, self._addresses[0], num_tasks, vocab_size, self._addresses[1])
        token_ids: list[int] = self._tasks["token_id"][:num_tasks].tolist()
        if _OUT_OF_MEMORY in token_ids:
            raise MemoryError("no memory to sort the likeliest tokens of a row")
        return token_ids

    def drawn(self, place: int, vocab_size: int) -> Drawn:
        """Return all that came of the task at `place` of the last call. Valid until the next one."""
        done = self._tasks[place]
        num_top = min(max(int(done["num_top"]), 0), vocab_size, _MAX_TOP)
        top_ids = self._top_ids[place, :num_top]
        return Drawn(int(done["token_id"]), top_ids, float(done["highest"]), int(done["mass"]))


def load_fused_sampling(team: Team | None = None) -> FusedSampling | None:
    """Return the compiled sampler; None where there are no kernels: `distribution` gives the same tokens."""
    try:
        return FusedSampling(load_kernels(), team)
    except KernelsMissing:
        return None
