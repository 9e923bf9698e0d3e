"""Joins proposer, controllers and scheduler: gives a step its guesses, and learns what became of them.

Owns the counters and the measured cost of a row. Must not know logits, sampling or the time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from headrace.engine.request import EngineRequest
from headrace.engine.scheduler import Decision, Scheduler
from headrace.engine.speculation.controller import DraftController, learn
from headrace.engine.speculation.proposer import Proposer, Wanted
from headrace.engine.speculation.row_cost import RowCost
from headrace.engine.speculation.verify import Verified

_KEEP = 0.9
_SHARED_LEARNING_RATE = 0.02
_FIRST_SHIFT_SAMPLED = -0.7
"""Sampled answers repeat less than the greedy ones that proposers' outlooks were measured on."""
_EXPLORE_EVERY = 512
"""Steps without any guess after which some are made although rows seem too dear: else that is never measured
again."""
_EXPLORING_ROW_TOKENS = 0.5


class Speculator:
    """Turn of a step: add_drafts (after schedule), then observe (after the step)."""

    def __init__(self, proposer: Proposer, max_draft_tokens: int) -> None:
        assert max_draft_tokens >= 1, f"max_draft_tokens is {max_draft_tokens}"
        self.description = f"{proposer.description}, at most {max_draft_tokens} tokens"
        self.num_draft_tokens = 0
        self.num_accepted_tokens = 0
        self._proposer = proposer
        self._max_draft_tokens = max_draft_tokens
        self._row_cost = RowCost()
        self._tokens_per_request = 1.0
        """Tokens that a step gives each decoding request, smoothed."""
        self._num_steps_without = 0
        self._shifts = {True: 0.0, False: _FIRST_SHIFT_SAMPLED}
        """What greedy and sampled requests begin with: learned from all of them."""

    def __repr__(self) -> str:
        return (
            f"<Speculator {self.description}: {self.num_accepted_tokens} of {self.num_draft_tokens} guesses "
            f"right, {self._row_cost!r}>"
        )

    def add_drafts(self, decision: Decision, scheduler: Scheduler) -> None:
        """Let decoding requests of `decision` compute guesses, too, as far as they pay and there is room."""
        places = [place for place, item in enumerate(decision.scheduled) if item.is_decoding]
        if not places:
            return
        row_tokens = self._row_tokens(len(places))
        self._num_steps_without += 1
        if self._num_steps_without > _EXPLORE_EVERY:
            row_tokens = min(row_tokens, _EXPLORING_ROW_TOKENS)
        elif row_tokens >= 1.0:
            return  # A row brings at most one token.
        wanted: list[Wanted] = []
        reserved: list[int] = []
        for place in places:
            request = decision.scheduled[place].request
            num_tokens = self._choose(decision, request, scheduler, row_tokens)
            num_reserved = scheduler.reserve_drafts(decision, place, num_tokens) if num_tokens else 0
            if num_reserved:
                wanted.append(Wanted(request, num_reserved))
                reserved.append(place)
        if not wanted:
            return
        self._num_steps_without = 0
        proposed = self._proposer.propose(wanted)
        for place, (request, num_reserved), drafts in zip(reserved, wanted, proposed, strict=True):
            if request.constraint is not None and drafts:
                drafts = drafts[: request.constraint.count_valid(drafts)]
            scheduler.set_drafts(decision, place, num_reserved, drafts)

    def _choose(
        self, decision: Decision, request: EngineRequest, scheduler: Scheduler, row_tokens: float
    ) -> int:
        room = scheduler.draft_room(decision, request, self._max_draft_tokens)
        if not room:
            return 0
        outlook = self._proposer.outlook(request, room)
        return self._controller(request).choose(outlook, row_tokens).num_tokens

    def observe(self, decision: Decision, verified: Sequence[Verified], step_s: float) -> None:
        """Learn from a step: which guesses were right, and how long it took."""
        num_tokens = 0
        for result in verified:
            num_drafts = len(result.draft_token_ids)
            num_tokens += len(result.token_ids)
            if num_drafts:
                self.num_draft_tokens += num_drafts
                self.num_accepted_tokens += result.num_accepted
                surprise = self._controller(result.request).observe(num_drafts, result.num_accepted)
                is_greedy = result.request.sampling.temperature == 0
                self._shifts[is_greedy] = learn(self._shifts[is_greedy], _SHARED_LEARNING_RATE * surprise)
        if all(item.is_decoding for item in decision.scheduled):
            self._row_cost.observe(decision.num_tokens, step_s)
            rate = num_tokens / len(decision.scheduled)
            self._tokens_per_request += (1 - _KEEP) * (rate - self._tokens_per_request)

    def sleep(self, level: Literal[1, 2]) -> None:
        """Give the proposer's memory back, as `ModelRunner.sleep`."""
        self._proposer.sleep(level)

    def wake(self) -> None:
        """Take it again, as `ModelRunner.wake`."""
        self._proposer.wake()

    def _row_tokens(self, num_decoding: int) -> float:
        """Return how many tokens this batch makes in the time by which one more row lengthens its step."""
        cost = self._row_cost
        step_s = cost.step_s(num_decoding)
        if step_s <= 0:
            return 0.0
        return cost.row_s * num_decoding * max(self._tokens_per_request, 1.0) / step_s

    def _controller(self, request: EngineRequest) -> DraftController:
        if request.draft_controller is None:
            request.draft_controller = DraftController(self._shifts[request.sampling.temperature == 0])
        return request.draft_controller
