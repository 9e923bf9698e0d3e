"""Decides which guessed tokens stand: each row's token is sampled as if nothing had been guessed.

Row by row: a row counts only if every guess before it was the token that was sampled. So each token sees the
same tokens, penalties and random number (seed, index) as in a step of its own, and the answer is the same
with and without guesses, greedy or sampled. Must not know how logits or guesses come.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from headrace.api.messages import FinishReason, TokenLogprobs
from headrace.engine.request import EngineRequest
from headrace.engine.sampler import Sampled
from headrace.engine.scheduler import Scheduled

Sample = Callable[[Sequence[int] | None, Sequence[EngineRequest]], list[Sampled]]
"""(rows of the logits, their requests) to one result each. No rows: row i belongs to request i."""


@dataclass(slots=True)
class Verified:
    """What one step gave one request. Its tokens are appended to it already."""

    request: EngineRequest
    draft_token_ids: Sequence[int] = ()
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: FinishReason | None = None
    error: str = ""
    num_accepted: int = 0
    """Guesses that became tokens, so that their keys and values stand."""

    def take(self, result: Sampled) -> bool:
        """Take the next row's result; say whether the row after it counts, too."""
        if result.error:
            self._take_error(result.error)
            return False
        request, token_id, index = self.request, result.token_id, len(self.token_ids)
        num_before = len(request.token_ids)
        self.finish_reason = request.append(token_id)
        if len(request.token_ids) == num_before:  # a stop token is not kept
            return False
        self.token_ids.append(token_id)
        if result.logprobs is not None:
            if self.logprobs is None:
                self.logprobs = []
            self.logprobs.append(result.logprobs)
        drafts = self.draft_token_ids
        if index >= len(drafts) or drafts[index] != token_id:
            return False
        self.num_accepted += 1
        return self.finish_reason is None

    def _take_error(self, error: str) -> None:
        """A first row's error ends the request. A later row is computed again, as the first of the next step:
        until then it is as if nothing had been guessed."""
        if self.token_ids:
            self.num_accepted -= 1
        else:
            self.finish_reason, self.error = "error", error


def verify(scheduled: Sequence[Scheduled], sample: Sample) -> list[Verified]:
    """Sample each request's rows in order, as far as they count, and append the tokens to the requests.

    Returns one result per request that is sampled, in order. All first rows are sampled together, then all
    second ones that count, and so on.
    """
    results: list[Verified] = []
    rows: list[int] = []
    row = 0
    for item in scheduled:
        if item.is_sampled:
            results.append(Verified(item.request, item.draft_token_ids))
            rows.append(row)
            row += 1 + len(item.draft_token_ids)
    if row == len(rows):  # nothing was guessed
        for result, sampled in zip(results, sample(None, [v.request for v in results]), strict=True):
            result.take(sampled)
        return results
    open_rows = list(zip(rows, results))
    while open_rows:
        sampled_rows = sample([place for place, _ in open_rows], [v.request for _, v in open_rows])
        open_rows = [
            (place + 1, result)
            for (place, result), sampled in zip(open_rows, sampled_rows, strict=True)
            if result.take(sampled)
        ]
    return results
