"""How long an engine may say nothing before it counts as hung. Pure: loads and times in, a limit out.

A step's length is predicted from what is in the engine: a silence of many such steps is none of them.
Must not know processes, requests' contents, or what follows from a hang.
"""

from __future__ import annotations

from dataclasses import dataclass

from headrace.api.messages import EngineLoad, EngineSpec
from headrace.policy.step_time import step_s

STEPS_OF_SILENCE = 20.0
"""A step on a machine whose cores are shared by many takes several times what is predicted; not so many."""
LONGEST_STEPS_OF_SILENCE = 10.0
"""The same for the longest of the recent steps, whatever made it long."""
KNOWN_AFTER_STEPS = 64
"""Before that the model of a step is none, and first steps may compile or read what later ones find."""
_FORGET_PER_STEP = 0.01


@dataclass(frozen=True, slots=True)
class EngineTimeLimits:
    """How long an engine may say nothing before it is killed and started again."""

    silence_s: float = 60.0
    """Most, while it serves: it sends one batch per step, and one per second while idle."""
    least_silence_s: float = 5.0
    """However short its steps are: five times what an idle engine is silent."""
    start_phase_s: float = 900.0
    """Within one phase of its start: a large model may take minutes to read."""
    check_s: float = 0.5
    sleep_s: float = 60.0
    """For falling asleep and for waking, which may read the weights again."""


class SilenceWatch:
    """Follows one engine process: how long it has been silent, and how long it may be.

    Silence is counted in checks of one's own: while this process was stopped, or its machine, nothing was
    heard of anybody.
    """

    def __init__(self, spec: EngineSpec, limits: EngineTimeLimits, now_s: float) -> None:
        self._spec = spec
        self._limits = limits
        self._checked_at_s = now_s
        self._load: EngineLoad | None = None
        self._num_sent = self._num_sent_tokens = 0
        """Requests since the last load, and their tokens."""
        self._longest_step_s = 0.0
        self.silent_s = 0.0
        self.is_changing = False
        """It falls asleep or wakes, which is no step."""

    def __repr__(self) -> str:
        return f"SilenceWatch(silent for {self.silent_s:.1f} s of {self.limit_s():.1f} s)"

    def heard(self, now_s: float, load: EngineLoad | None = None) -> None:
        """Take note that the engine said something; `load`: after a step, or while it is idle."""
        self.silent_s = 0.0
        self._checked_at_s = now_s
        if load is not None:
            self._load = load
            self._num_sent = self._num_sent_tokens = 0
            self._longest_step_s = max(load.step_s, self._longest_step_s * (1.0 - _FORGET_PER_STEP))

    def sent(self, num_tokens: int) -> None:
        """Take note that a request with so many tokens was sent to it."""
        self._num_sent += 1
        self._num_sent_tokens += num_tokens

    def check(self, now_s: float) -> bool:
        """Say whether it has been silent for too long. Called every `check_s`."""
        self.silent_s += min(max(0.0, now_s - self._checked_at_s), 2.0 * self._limits.check_s)
        self._checked_at_s = now_s
        return self.silent_s > self.limit_s()

    def limit_s(self) -> float:
        """Return how long it may be silent from its last word on."""
        limits, load = self._limits, self._load
        if load is None:
            return limits.start_phase_s
        model = load.step_model
        if self.is_changing or load.sleep_level or model is None or model.num_steps < KNOWN_AFTER_STEPS:
            return limits.silence_s
        # The most that its next steps can hold: whatever was sent may be in the first one already.
        num_used_blocks = load.num_total_blocks - load.num_free_blocks
        num_kv_tokens = num_used_blocks * self._spec.block_size + self._num_sent_tokens
        num_uncomputed = load.num_uncomputed_tokens + self._num_sent_tokens
        predicted_s = step_s(
            model,
            min(self._spec.token_budget, num_uncomputed),
            num_kv_tokens,
            min(self._spec.max_running, load.num_running + load.num_waiting + self._num_sent),
            num_kv_tokens,
        )
        limit_s = max(STEPS_OF_SILENCE * predicted_s, LONGEST_STEPS_OF_SILENCE * self._longest_step_s)
        return min(limits.silence_s, max(limits.least_silence_s, limit_s))
