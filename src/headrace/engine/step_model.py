"""What a step takes: fits seconds = a + b*P + q*P*C + c*D + d*KV to recent steps, and says how well.

P uncached prompt tokens, C the mean context they attend to, D decoded tokens, KV tokens that those read; what
guesses attend to counts with P*C. Owns the fit: least squares of the relative error over the normal
equations, old steps forgotten exponentially, a weak pull towards the last solution, which keeps what recent
steps say nothing about (no prompt for a while, always the same batch). Pure. Must not know engines or the
time. `policy.step_time` computes with the result.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from headrace.api.messages import StepModel

_MEMORY_STEPS = 512
"""A step counts half of its weight after about 355 further ones."""
_ERROR_MEMORY_STEPS = 256
_SOLVE_EVERY = 16
"""Steps. Each of the first ones is solved for: what is told of a new engine decides where prompts go."""
_TELLING_TOKENS = 256
"""Prompt tokens of one step whose time is mostly theirs. Of smaller ones alone the fixed part is unknown."""
_TELLING_SQUARES = 0.05
"""Sum over steps of (P / 256)^2 from which on the pull towards no cost no longer matters: one step of 64."""
_SIZE = 5
_UNITS = (1.0, 256.0, 256.0 * 512.0, 8.0, 8.0 * 512.0)
"""Of 1, P, P*C, D and KV, so that the unknowns are of about the same size."""
_PULL = 1e-3
"""Weight of the last solution, in steps."""
_MAX_STEP_S = 600.0
_MIN_EXPECTED_S = 1e-4
"""Steps are weighted by one over their expected time squared, which is at least this."""
_MIN_EXPECTED = 32
"""Steps of a kind (with or without prompt tokens) after which one is expected to be like the others."""
_MAX_RELATIVE_ERROR = 10.0
"""Most that one step adds to the mean of the errors."""
_NO_RUN = (0, 0, 0, 0)


class StepContents(NamedTuple):
    """What is in a step."""

    num_prompt_tokens: int = 0
    num_attended_tokens: int = 0
    """P*C: over those prompt tokens, the sum of the tokens that each attends to, itself included."""
    num_decoded_tokens: int = 0
    """One per decoding request, and its guesses."""
    num_kv_tokens: int = 0
    num_guess_attended_tokens: int = 0
    """Over the guesses, the sum of the tokens that each attends to."""


class StepModelFit:
    """Takes each step's time and contents; gives the coefficients and costs derived from them, in seconds."""

    def __init__(self) -> None:
        self._keep = 1.0 - 1.0 / _MEMORY_STEPS
        self._sums = [0.0] * (_SIZE * (_SIZE + 1) // 2 + _SIZE)
        """Weighted sums of products: for each of the 5 unknowns' factors with itself and all after it, and
        with the time. The upper half of the normal equations, row by row."""
        self._weight = self._count = 0.0
        """Sums of the weights and of 1."""
        self._recent = [0.0] * 5
        """Sums over recent steps of P, P*C, D, KV, and of the steps that decode."""
        self._num_of_kind = [0, 0]
        """Steps without and with prompt tokens."""
        self._least_prompt, self._most_prompt = math.inf, 0
        """Prompt tokens of a step."""
        self._squares = 0.0
        """Of P, in its unit, over all steps."""
        self._num_unsolved = 0
        self._solution = [0.0] * _SIZE
        self._is_solved = False
        self._run = _NO_RUN
        """P, P*C of prompts, D, and P*C of guesses of the last steps, which are added to the sums together:
        while a batch decodes, hundreds in a row are alike but for KV."""
        self._run_sums = [0.0] * 5
        """Over those: of 1, KV, KV*KV, time, time*KV."""
        self._base_s = self._limit_s = self._expected_s = 0.0
        self._error = self._num_errors = 0.0
        self._num_steps = 0

    def __repr__(self) -> str:
        a, b, q, c, d = self.coefficients
        return (
            f"<StepModelFit {1e3 * a:.3f} ms + {1e6 * b:.2f} µs/prompt token + {1e9 * q:.2f} ns/attended "
            f"+ {1e6 * c:.2f} µs/decoded token + {1e9 * d:.2f} ns/KV token, error {self.relative_error:.1%}>"
        )

    def observe(self, seconds: float, contents: StepContents) -> None:
        """Take one step. One of nothing or of no time says nothing."""
        num_prompt, num_attended, num_decoded, num_kv, num_guessing = contents
        if not (0 < seconds < math.inf) or num_prompt + num_decoded <= 0:
            return
        run = (num_prompt, num_attended, num_decoded, num_guessing)
        if run != self._run or self._run_sums[0] >= _SOLVE_EVERY:
            self._begin_run(run, num_kv, min(seconds, _MAX_STEP_S))
        kv = num_kv / _UNITS[4]
        if self._is_solved:
            predicted_s = self._base_s + self._solution[4] * kv
            error = min(abs(predicted_s - seconds) / seconds, _MAX_RELATIVE_ERROR)
            keep = 1.0 - 1.0 / _ERROR_MEMORY_STEPS
            self._error = self._error * keep + error
            self._num_errors = self._num_errors * keep + 1.0
        seconds = min(seconds, self._limit_s)
        sums = self._run_sums
        sums[0] += 1.0
        sums[1] += kv
        sums[2] += kv * kv
        sums[3] += seconds
        sums[4] += seconds * kv
        self._num_steps += 1
        if self._num_steps <= _SOLVE_EVERY:
            self._add_run()

    # ---- what was found

    @property
    def coefficients(self) -> tuple[float, float, float, float, float]:
        """(a, b, q, c, d) in seconds. None is negative; all 0: nothing measured yet."""
        a, b, q, c, d = self._solution
        return a, b / _UNITS[1], q / _UNITS[2], c / _UNITS[3], d / _UNITS[4]

    @property
    def relative_error(self) -> float:
        """Mean of |predicted - measured| / measured over recent steps, each predicted before it was taken."""
        return self._error / self._num_errors if self._num_errors > 0 else 0.0

    @property
    def model(self) -> StepModel | None:
        """What is published; None: nothing measured yet."""
        if not self._num_steps:
            return None
        return StepModel(*self.coefficients, self.relative_error, self._num_steps)

    @property
    def prefill_token_s(self) -> float:
        """Engine time per uncached prompt token at the usual context; 0: not measured yet. That is so, too,
        after a few small steps: their tokens would seem to cost nothing, and attract all prompts."""
        is_apart = self._most_prompt >= min(_TELLING_TOKENS, 2 * self._least_prompt)
        if not is_apart or self._squares < _TELLING_SQUARES:
            return 0.0
        num_prompt, num_attended = self._recent[:2]
        _, b, q, _, _ = self.coefficients
        return b + q * num_attended / num_prompt if num_prompt > 0 else b

    @property
    def step_per_request_s(self) -> float:
        """Time by which each decoded token of usual context lengthens a step; 0: not measured yet."""
        num_decoded, num_kv = self._recent[2:4]
        _, _, _, c, d = self.coefficients
        return c + d * num_kv / num_decoded if num_decoded > 0 else c

    @property
    def decode_token_s(self) -> float:
        """Engine time per output token, its part of the step's fixed cost included; 0: not measured yet."""
        num_decoded, _, num_steps = self._recent[2:]
        if num_decoded <= 0:
            return 0.0
        return self.step_per_request_s + self.coefficients[0] * num_steps / num_decoded

    # ---- the fit

    def _begin_run(self, run: tuple[int, int, int, int], num_kv: int, seconds: float) -> None:
        """Close the last run, and say what is expected of the steps of this one."""
        self._add_run()
        self._run = run
        num_prompt, num_attended, num_decoded, num_guessing = run
        a, b, q, c, d = self._solution
        attended = (num_attended + num_guessing) / _UNITS[2]
        self._base_s = a + b * num_prompt / _UNITS[1] + q * attended + c * num_decoded / _UNITS[3]
        expected_s = self._base_s + d * num_kv / _UNITS[4]
        self._limit_s = _MAX_STEP_S
        if self._num_of_kind[num_prompt > 0] > _MIN_EXPECTED and expected_s > 0:
            # A step that takes much longer (the process was stopped, say) counts as this long: as a few times
            # the usual error, so that a change of the machine is followed within some steps.
            self._limit_s = min(
                _MAX_STEP_S, expected_s * (1.0 + min(7.0, max(1.0, 6.0 * self.relative_error)))
            )
        self._expected_s = max(expected_s, min(seconds, self._limit_s) / 2.0, _MIN_EXPECTED_S)

    def _add_run(self) -> None:
        """Add the last steps, alike but for KV, to the sums; solve now and then."""
        n, kv, kv2, t, tkv = self._run_sums
        if not n:
            return
        self._run_sums = [0.0] * 5
        num_prompt, num_attended, num_decoded, num_guessing = self._run
        self._run = _NO_RUN
        p, d = num_prompt / _UNITS[1], num_decoded / _UNITS[3]
        pc = (num_attended + num_guessing) / _UNITS[2]
        keep, weight = self._keep**n, 1.0 / (self._expected_s * self._expected_s)
        np, npc, nd = n * p, n * pc, n * d
        products = [n, np, npc, nd, kv, t, np * p, np * pc, np * d, p * kv, p * t]
        products += (npc * pc, npc * d, pc * kv, pc * t, nd * d, d * kv, d * t, kv2, tkv)
        self._sums = [old * keep + weight * new for old, new in zip(self._sums, products)]
        self._weight = self._weight * keep + weight * n
        self._count = self._count * keep + n
        recent = (n * num_prompt, n * num_attended, n * num_decoded, kv * _UNITS[4], n * (num_decoded > 0))
        self._recent = [old * keep + new for old, new in zip(self._recent, recent)]
        self._num_of_kind[num_prompt > 0] += int(n)
        self._least_prompt = min(self._least_prompt, num_prompt)
        self._most_prompt = max(self._most_prompt, num_prompt)
        self._squares += np * p
        self._num_unsolved += int(n)
        if self._num_unsolved >= _SOLVE_EVERY or self._num_steps <= _SOLVE_EVERY:
            self._solution = self._solve()
            self._num_unsolved = 0
            self._is_solved = any(self._solution)

    def _solve(self) -> list[float]:
        """Solve for coefficients >= 0: one that comes out negative is set to 0, the rest is solved again."""
        free = list(range(_SIZE))
        rows = self._equations()
        while free:
            solution = _solve_spd([[rows[i][j] for j in free] + [rows[i][_SIZE]] for i in free])
            if not all(math.isfinite(value) for value in solution):
                return self._solution
            worst = min(range(len(free)), key=solution.__getitem__)
            if solution[worst] >= 0:
                found = [0.0] * _SIZE
                for i, value in zip(free, solution):
                    found[i] = value
                return found
            del free[worst]
        return [0.0] * _SIZE

    def _equations(self) -> list[list[float]]:
        """Return the normal equations with the pull: 5 rows of 5 factors and the right side."""
        rows = [[0.0] * (_SIZE + 1) for _ in range(_SIZE)]
        place = 0
        for i in range(_SIZE):
            for j in range(i, _SIZE + 1):
                rows[i][j] = self._sums[place]
                if j < _SIZE:
                    rows[j][i] = rows[i][j]
                place += 1
        pull = _PULL * self._weight / self._count
        for i, last in enumerate(self._solution):
            rows[i][i] += pull
            rows[i][_SIZE] += pull * last
        return rows


def _solve_spd(matrix: list[list[float]]) -> list[float]:
    """Solve equations whose matrix is symmetric and positive definite (the pull sees to it): no pivoting is
    needed. Each row ends with its right side; the rows are changed."""
    size = len(matrix)
    for i in range(size):
        pivot = matrix[i]
        for k in range(i + 1, size):
            row = matrix[k]
            factor = row[i] / pivot[i] if pivot[i] else math.nan
            for j in range(i, size + 1):
                row[j] -= factor * pivot[j]
    solution = [0.0] * size
    for i in reversed(range(size)):
        row = matrix[i]
        known = sum([row[j] * solution[j] for j in range(i + 1, size)])
        solution[i] = (row[size] - known) / row[i] if row[i] else math.nan
    return solution
