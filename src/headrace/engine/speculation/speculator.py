"""Joins proposer, controllers and scheduler: gives a step its guesses, and learns what became of them.

Owns the counters and the measured cost of a row. Must not know logits, sampling or the time.
"""

from __future__ import annotations

from collections.abc import Sequence

from headrace.engine.request import EngineRequest
from headrace.engine.scheduler import Decision, Scheduler
from headrace.engine.speculation.controller import DraftController
from headrace.engine.speculation.proposer import Proposer, Wanted
from headrace.engine.speculation.row_cost import RowCost
from headrace.engine.speculation.verify import Verified

_KEEP = 0.9


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
        wanted: list[Wanted] = []
        reserved: list[int] = []
        for place in places:
            request = decision.scheduled[place].request
            room = scheduler.draft_room(decision, request, self._max_draft_tokens)
            num_tokens = self._controller(request).choose(room, row_tokens).num_tokens
            num_reserved = scheduler.reserve_drafts(decision, place, num_tokens) if num_tokens else 0
            if num_reserved:
                wanted.append(Wanted(request, num_reserved))
                reserved.append(place)
        if wanted:
            proposed = self._proposer.propose(wanted)
            for place, (_, num_reserved), drafts in zip(reserved, wanted, proposed, strict=True):
                scheduler.set_drafts(decision, place, num_reserved, drafts)

    def observe(self, decision: Decision, verified: Sequence[Verified], step_s: float) -> None:
        """Learn from a step: which guesses were right, and how long it took."""
        num_tokens = 0
        for result in verified:
            num_drafts = len(result.draft_token_ids)
            num_tokens += len(result.token_ids)
            if num_drafts:
                self.num_draft_tokens += num_drafts
                self.num_accepted_tokens += result.num_accepted
                self._controller(result.request).observe(num_drafts, result.num_accepted)
        if all(item.is_decoding for item in decision.scheduled):
            self._row_cost.observe(decision.num_tokens, step_s)
            rate = num_tokens / len(decision.scheduled)
            self._tokens_per_request += (1 - _KEEP) * (rate - self._tokens_per_request)

    def _row_tokens(self, num_decoding: int) -> float:
        """Return how many tokens this batch makes in the time by which one more row lengthens its step."""
        cost = self._row_cost
        step_s = cost.step_s(num_decoding)
        if step_s <= 0:
            return 0.0
        return cost.row_s * num_decoding * max(self._tokens_per_request, 1.0) / step_s

    def _controller(self, request: EngineRequest) -> DraftController:
        if request.draft_controller is None:
            request.draft_controller = DraftController()
        return request.draft_controller
