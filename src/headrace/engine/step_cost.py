"""What a step costs: fits seconds = a + b*P + d*D over recent steps, P prompt tokens and D requests decoding.

Owns the fit: weighted least squares over the normal equations, old steps forgotten exponentially. A weak
pull towards the last solution keeps what the recent steps say nothing about (no prompt for a while, always
the same batch). Pure. Must not know engines or the time.
"""

from __future__ import annotations

import math

_MEMORY_STEPS = 512
"""A step counts half of its weight after about 355 further ones."""
_SOLVE_EVERY = 16
_TOKENS, _REQUESTS = 256.0, 8.0
"""Units of P and D, so that the three unknowns are of about the same size."""
_PULL = 1e-3
"""Weight of the last solution, in steps."""
_MAX_OUTLIER = 8.0
"""A step that takes this many times what was expected (the process was stopped, say) counts as this many,
once enough steps of its kind are known to expect anything."""
_MIN_EXPECTED = 32


class StepCost:
    """Takes each step's figures; gives the cost of a prompt token and of an output token, in seconds."""

    def __init__(self) -> None:
        self._keep = 1.0 - 1.0 / _MEMORY_STEPS
        # Sums over steps of 1, p, d, pp, pd, dd, t, tp, td, and of the steps that decode.
        self._sums = [0.0] * 9
        self._num_decoding = 0.0
        self._num_of_kind = {False: 0, True: 0}
        """Steps without and with prompt tokens."""
        self._num_unsolved = 0
        self._solution = (0.0, 0.0, 0.0)
        self._kind = (0, 0)
        """Prompt tokens and decoding requests of the last steps, which are added to the sums together: while
        a batch decodes, hundreds in a row are alike."""
        self._num_alike = 0
        self._alike_s = 0.0
        self._limit_s = math.inf

    def __repr__(self) -> str:
        a, b, d = self.coefficients
        return f"<StepCost {1e3 * a:.3f} ms + {1e6 * b:.2f} µs/prompt token + {1e6 * d:.2f} µs/decoding>"

    def observe(self, seconds: float, num_prompt_tokens: int, num_decoding: int) -> None:
        """Take one step: how long it took, and what was in it. One of nothing or of no time says nothing."""
        if not (0 < seconds < math.inf) or num_prompt_tokens + num_decoding <= 0:
            return
        kind = (num_prompt_tokens, num_decoding)
        if kind != self._kind or self._num_alike >= _SOLVE_EVERY:
            self._add_alike()
            self._kind = kind
            self._limit_s = self._longest_s()
        self._num_alike += 1
        self._alike_s += min(seconds, self._limit_s)

    @property
    def step_per_request_s(self) -> float:
        """Time by which each decoding request lengthens a step; 0: not measured yet."""
        return self.coefficients[2]

    def _add_alike(self) -> None:
        """Add the last steps, all of one kind, to the sums; solve now and then."""
        num = self._num_alike
        num_prompt_tokens, num_decoding = self._kind
        if num:
            p, d = num_prompt_tokens / _TOKENS, num_decoding / _REQUESTS
            seconds = self._alike_s
            new = (num, num * p, num * d, num * p * p, num * p * d, num * d * d)
            keep = self._keep**num
            sums = self._sums
            self._sums = [
                old * keep + value for old, value in zip(sums, (*new, seconds, seconds * p, seconds * d))
            ]
            self._num_decoding = self._num_decoding * keep + num * (num_decoding > 0)
            self._num_of_kind[num_prompt_tokens > 0] += num
            self._num_alike, self._alike_s = 0, 0.0
            self._num_unsolved += num
            if self._num_unsolved >= _SOLVE_EVERY or self._solution == (0.0, 0.0, 0.0):
                self._solution = self._solve()
                self._num_unsolved = 0

    @property
    def coefficients(self) -> tuple[float, float, float]:
        """(a, b, d): seconds per step, per prompt token, per decoding request. None is negative."""
        if self._num_alike and self._solution == (0.0, 0.0, 0.0):
            self._add_alike()
        x, y, z = self._solution
        return x, y / _TOKENS, z / _REQUESTS

    @property
    def prefill_token_s(self) -> float:
        """Engine time per uncached prompt token; 0: not measured yet."""
        return self.coefficients[1]

    @property
    def decode_token_s(self) -> float:
        """Engine time per output token, its part of the step's fixed cost included; 0: not measured yet."""
        a, _, d = self.coefficients
        if self._num_decoding <= 0:
            return 0.0
        mean_batch = self._sums[2] * _REQUESTS / self._num_decoding
        return d + a / mean_batch

    def _longest_s(self) -> float:
        """Return the longest time that the next steps, of the present kind, may count as."""
        num_prompt_tokens, num_decoding = self._kind
        x, y, z = self._solution
        if self._num_of_kind[num_prompt_tokens > 0] <= _MIN_EXPECTED or x + y + z <= 0:
            return math.inf
        expected_s = x + y * num_prompt_tokens / _TOKENS + z * num_decoding / _REQUESTS
        return _MAX_OUTLIER * expected_s if expected_s > 0 else math.inf

    def _solve(self) -> tuple[float, float, float]:
        """Solve for coefficients >= 0: one that comes out negative is set to 0, the rest is solved again."""
        free = [True, True, True]
        for _ in range(3):
            solution = self._solve_free(free)
            worst = min(range(3), key=lambda i: solution[i])
            if solution[worst] >= 0:
                return solution[0], solution[1], solution[2]
            free[worst] = False
        return 0.0, 0.0, 0.0

    def _solve_free(self, free: list[bool]) -> list[float]:
        n, p, d, pp, pd, dd, t, tp, td = self._sums
        rows = [[n, p, d, t], [p, pp, pd, tp], [d, pd, dd, td]]
        for i, last in enumerate(self._solution):
            if free[i]:
                rows[i][i] += _PULL
                rows[i][3] += _PULL * last
        unknown = [i for i in range(3) if free[i]]
        matrix = [[rows[i][j] for j in unknown] + [rows[i][3]] for i in unknown]
        size = len(unknown)
        for i in range(size):  # symmetric and positive definite by the pull: no pivoting is needed
            for k in range(i + 1, size):
                factor = matrix[k][i] / matrix[i][i]
                for j in range(i, size + 1):
                    matrix[k][j] -= factor * matrix[i][j]
        solution = [0.0, 0.0, 0.0]
        for i in reversed(range(size)):
            known = sum(matrix[i][j] * solution[unknown[j]] for j in range(i + 1, size))
            solution[unknown[i]] = (matrix[i][size] - known) / matrix[i][i]
        return solution
