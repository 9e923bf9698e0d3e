"""The sampler's arithmetic in one call of the compiled kernels, for all rows of a step.

Gives what `distribution` gives, token for token. Owns the tasks' memory. Must not know requests.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from headrace.api.messages import TokenLogprobs
from headrace.engine.distribution import logprobs_of
from headrace.engine.operations.kernels import KernelsMissing, Library, Team, load_kernels

_MAX_TOP = 64
TASK = np.dtype(
    [
        ("logits", np.uint64),
        ("settings", np.uint64),
        ("allowed", np.uint64),
        ("index", np.int64),
        ("is_checked", np.int64),
        ("mass", np.int64),
        ("highest", np.float32),
        ("logit", np.float32),
        ("token_id", np.int32),
    ],
    align=True,
)
"""The same fields in the same order as `SampleTask` in kernels/sampling.h."""
NOT_FINITE = -1
"""In place of a token: the highest logit is not finite, or some logit is NaN."""
_OUT_OF_MEMORY = -2
NONE_ALLOWED = -3
"""In place of a token: all logits became minus infinity."""


class FusedSampling:
    """The compiled sampler. One caller at a time."""

    def __init__(self, library: Library, team: Team | None = None) -> None:
        """`team`: the threads that share the rows; None: the caller alone. Raises KernelsMissing."""
        self._team = team
        pointer = ctypes.c_void_p
        self._function = library.function(
            "headrace_sample", [pointer, pointer, ctypes.c_int, ctypes.c_int, pointer, pointer]
        )
        self._reserve(64)

    def _reserve(self, num_tasks: int) -> None:
        self._tasks = np.zeros(num_tasks, TASK)
        self._columns = {name: self._tasks[name] for name in TASK.names or ()}
        self._top_ids = np.zeros((num_tasks, _MAX_TOP), np.int32)
        self._top_logits = np.zeros((num_tasks, _MAX_TOP), np.float32)
        self._addresses = tuple(array.ctypes.data for array in (self._tasks, self._top_ids, self._top_logits))

    def choose(
        self,
        logits_SV: NDArray[np.float32],
        rows: Sequence[int],
        settings: Sequence[int],
        indices: Sequence[int],
        masks: Sequence[int] = (),
        *,
        are_checked: bool = False,
    ) -> list[int]:
        """Return a token for each of `rows`, or what stands in its place.

        Of each row: the address of its SampleSettings, which token of its generation it is, and the address
        of the bits that say which tokens are allowed (0: all; no `masks`: all, in every row).
        `are_checked`: all have a mask and were given a token before, so that logits that are not finite need
        not be looked for. The logits stay as they are. Raises MemoryError.
        """
        num_tasks, vocab_size = len(rows), logits_SV.shape[1]
        if num_tasks > len(self._tasks):
            self._reserve(2 * num_tasks)
        assert logits_SV.strides[1] == logits_SV.itemsize == 4, f"rows lie apart: {logits_SV.strides}"
        first, stride = logits_SV.ctypes.data, logits_SV.strides[0]
        columns = self._columns
        columns["logits"][:num_tasks] = [first + stride * row for row in rows]
        columns["settings"][:num_tasks] = settings
        columns["index"][:num_tasks] = indices
        columns["allowed"][:num_tasks] = masks or 0
        columns["is_checked"][:num_tasks] = are_checked
        handle = None if self._team is None else self._team.handle
        tasks, top_ids, top_logits = self._addresses
        self._function(handle, tasks, num_tasks, vocab_size, top_ids, top_logits)
        token_ids: list[int] = columns["token_id"][:num_tasks].tolist()
        if _OUT_OF_MEMORY in token_ids:
            raise MemoryError("no memory to sort the likeliest tokens of a row")
        return token_ids

    def logprobs(self, task: int, num_top: int) -> TokenLogprobs:
        """Return the log-probabilities of the token that the last call chose for `task`, and of the `num_top`
        likeliest ones, as its settings asked."""
        done = self._tasks[task]
        top_ids, top_logits = self._top_ids[task, :num_top], self._top_logits[task, :num_top]
        return logprobs_of(
            float(done["logit"]), top_ids, top_logits, float(done["highest"]), int(done["mass"])
        )


def load_fused_sampling(team: Team | None = None) -> FusedSampling | None:
    """Return the compiled sampler; None where there are no kernels: `distribution` gives the same tokens."""
    try:
        return FusedSampling(load_kernels(), team)
    except KernelsMissing:
        return None
