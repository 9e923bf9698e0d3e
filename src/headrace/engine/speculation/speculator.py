"""Joins proposer, controllers and scheduler: gives a step its guesses, and learns what became of them.

Owns the counters and what all requests' luck suggests. Must not know logits, sampling or the time; what rows
cost it is told with each step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from headrace.engine.prompt_budget import Coefficients
from headrace.engine.request import EngineRequest
from headrace.engine.scheduler import Decision, Scheduler
from headrace.engine.speculation.controller import DraftController, learn
from headrace.engine.speculation.plan import Offer, choose_numbers
from headrace.engine.speculation.proposer import Proposer, Wanted
from headrace.engine.speculation.verify import Verified

_SHARED_LEARNING_RATE = 0.02
_FIRST_SHIFT_SAMPLED = -0.7
"""Sampled answers repeat less than the greedy ones that proposers' outlooks were measured on."""


_SURE = 0.9
"""Where a row costs more tokens than this, no guess is likely enough, and none is tried."""


class Speculator:
    """Turn of a step: add_drafts (after schedule), then observe (after the step)."""

    def __init__(self, proposer: Proposer, max_draft_tokens: int) -> None:
        assert max_draft_tokens >= 1, f"max_draft_tokens is {max_draft_tokens}"
        self.description = f"{proposer.description}, at most {max_draft_tokens} tokens"
        self.num_draft_tokens = 0
        self.num_accepted_tokens = 0
        self._proposer = proposer
        self._max_draft_tokens = max_draft_tokens
        self._shifts = {True: 0.0, False: _FIRST_SHIFT_SAMPLED}
        """What greedy and sampled requests begin with: learned from all of them."""

    def __repr__(self) -> str:
        return (
            f"<Speculator {self.description}: {self.num_accepted_tokens} of {self.num_draft_tokens} guesses "
            f"right>"
        )

    def add_drafts(self, decision: Decision, scheduler: Scheduler, coefficients: Coefficients) -> None:
        """Let decoding requests of `decision` compute guesses, too, as far as they pay and there is room.

        `coefficients`: of the step model (a, b, q, c, d), in seconds; zeros while nothing is measured: rows
        cost nothing then.
        """
        places = [place for place, item in enumerate(decision.scheduled) if item.is_decoding]
        if not places:
            return
        numbers = self._choose(decision, places, scheduler, coefficients)
        wanted: list[Wanted] = []
        reserved: list[int] = []
        for place, num_tokens in zip(places, numbers, strict=True):
            request = decision.scheduled[place].request
            num_tokens = min(num_tokens, scheduler.draft_room(decision, request, num_tokens))
            num_reserved = scheduler.reserve_drafts(decision, place, num_tokens) if num_tokens else 0
            if num_reserved:
                wanted.append(Wanted(request, num_reserved))
                reserved.append(place)
        if not wanted:
            return
        proposed = self._proposer.propose(wanted)
        for place, (request, num_reserved), drafts in zip(reserved, wanted, proposed, strict=True):
            if request.constraint is not None and drafts:
                drafts = drafts[: request.constraint.count_valid(drafts)]
            scheduler.set_drafts(decision, place, num_reserved, drafts)

    def _choose(
        self, decision: Decision, places: Sequence[int], scheduler: Scheduler, coefficients: Coefficients
    ) -> list[int]:
        """Return how many guesses each of the requests at `places` makes, room in the step aside.

        A guess costs a row, and attends to its request's context, whose keys are read for the token before
        it in any case.
        """
        requests = [decision.scheduled[place].request for place in places]
        a, b, q, c, d = coefficients
        num_contexts = [len(request.token_ids) for request in requests]
        step_s = a + c * len(requests) + d * sum(num_contexts)
        row_s = max(b, c)  # before any decode was measured c is nothing
        dearest_s = _SURE * step_s / len(requests)
        offers = []
        for request, num_context in zip(requests, num_contexts):
            offer = Offer((), row_s + q * num_context)
            room = scheduler.draft_room(decision, request, self._max_draft_tokens)
            if room and offer.row_s <= dearest_s:
                outlook = self._proposer.outlook(request, room)
                offer = Offer(self._controller(request).expect(outlook), offer.row_s)
            offers.append(offer)
        numbers = choose_numbers(offers, len(requests), step_s)
        return [
            self._controller(request).settle(number) if offer.row_s <= dearest_s else 0
            for request, number, offer in zip(requests, numbers, offers)
        ]

    def observe(self, verified: Sequence[Verified]) -> None:
        """Learn from a step which guesses were right."""
        for result in verified:
            num_drafts = len(result.draft_token_ids)
            if num_drafts:
                self.num_draft_tokens += num_drafts
                self.num_accepted_tokens += result.num_accepted
                surprise = self._controller(result.request).observe(num_drafts, result.num_accepted)
                is_greedy = result.request.sampling.temperature == 0
                self._shifts[is_greedy] = learn(self._shifts[is_greedy], _SHARED_LEARNING_RATE * surprise)

    def sleep(self, level: Literal[1, 2]) -> None:
        """Give the proposer's memory back, as `ModelRunner.sleep`."""
        self._proposer.sleep(level)

    def wake(self) -> None:
        """Take it again, as `ModelRunner.wake`."""
        self._proposer.wake()

    def _controller(self, request: EngineRequest) -> DraftController:
        if request.draft_controller is None:
            request.draft_controller = DraftController(self._shifts[request.sampling.temperature == 0])
        return request.draft_controller
