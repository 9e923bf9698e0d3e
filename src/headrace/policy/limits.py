"""A tenant's limits over all endpoints: requests and tokens per minute, requests at a time. Pure.

Rates are token buckets that hold one minute's worth: a tenant that was quiet may use a minute's allowance at
once, so that a limit of 60 per minute means that, and not one per second. Tokens are charged as expected on
arrival and corrected at the end, so that a bucket may go below zero; what is owed is waited for.
Must not know queues, requests' contents, or how a refusal is sent.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from headrace.api.messages import TenantRule

MAX_RETRY_AFTER_S = 3600
MIN_RETRY_AFTER_S = 1


@dataclass(frozen=True, slots=True)
class Refusal:
    """A limit that said no: what to tell, and when to come again."""

    message: str
    code: str
    retry_after_s: int
    status: int = 429
    """429: the tenant's own limit; 503: the system's state."""

    @classmethod
    def unavailable(cls, message: str, code: str, retry_after_s: int = 1) -> Refusal:
        return cls(message, code, retry_after_s, 503)


class RateBucket:
    """`per_minute` units per minute, at most one minute's worth at once. 0: no limit."""

    __slots__ = ("_level", "_updated_s", "per_minute")

    def __init__(self, per_minute: int) -> None:
        self.per_minute = per_minute
        self._level = float(per_minute)
        self._updated_s: float | None = None

    def __repr__(self) -> str:
        return f"<RateBucket {self._level:.1f}/{self.per_minute}>"

    def level(self, now_s: float) -> float:
        """What is left. A clock that jumps back refills nothing for the jump; one that jumps ahead refills
        one minute's worth at most."""
        if self._updated_s is None or now_s < self._updated_s:
            self._updated_s = now_s
        elif now_s > self._updated_s:
            gained = (now_s - self._updated_s) * self.per_minute / 60
            self._level = min(float(self.per_minute), self._level + gained)
            self._updated_s = now_s
        return self._level

    def wait_s(self, amount: float, now_s: float) -> float:
        """Seconds until `amount` may be taken; 0: now. What is more than a minute's worth needs a full
        bucket, and is paid for afterwards."""
        if not self.per_minute:
            return 0.0
        missing = min(amount, self.per_minute) - self.level(now_s)
        return missing * 60 / self.per_minute if missing > 1e-9 * self.per_minute else 0.0

    def take(self, amount: float, now_s: float) -> None:
        """Take `amount`; below zero if need be. Negative: give back."""
        if self.per_minute:
            level = self._level if now_s == self._updated_s else self.level(now_s)
            self._level = min(float(self.per_minute), level - amount)

    def give_back(self, amount: float) -> None:
        """Undo a `take`."""
        if self.per_minute:
            self._level = min(float(self.per_minute), self._level + amount)

    def set_rate(self, per_minute: int, now_s: float) -> None:
        """Change the limit; what was used lately stays used. A new limit begins full."""
        if per_minute == self.per_minute:
            return
        used = self.per_minute - self.level(now_s) if self.per_minute else 0.0
        self.per_minute = per_minute
        self._level = per_minute - used


class TenantLimits:
    """One tenant's limits, and what it has open."""

    def __init__(self, rule: TenantRule) -> None:
        self.rule = rule
        self._requests = RateBucket(rule.requests_per_minute)
        self._tokens = RateBucket(rule.tokens_per_minute)
        self._bound: dict[str, int] = {}
        self._elsewhere: dict[str, int] = {}
        self.num_bound = 0
        """Requests that this router bound and that have not ended."""
        self.num_elsewhere = 0
        """Requests that others bound, by the replicas' last reports."""
        self.is_passed_over = False
        """Some queue passes over it until one of its requests ends."""

    def __repr__(self) -> str:
        return f"<TenantLimits {self.rule.name} {self.num_bound} bound, {self.num_elsewhere} elsewhere>"

    def set_rule(self, rule: TenantRule, now_s: float) -> None:
        """Take new limits."""
        self.rule = rule
        self._requests.set_rate(rule.requests_per_minute, now_s)
        self._tokens.set_rate(rule.tokens_per_minute, now_s)

    # ---- rates

    def refusal(self, num_tokens: int, now_s: float) -> Refusal | None:
        """Return why a request of about `num_tokens` cannot be taken now, or None. Takes nothing."""
        rule = self.rule
        if rule.requests_per_minute:
            wait_s = self._requests.wait_s(1, now_s)
            if wait_s:
                return _rate_refusal(rule.name, "requests_per_minute", rule.requests_per_minute, "", wait_s)
        if rule.tokens_per_minute:
            wait_s = self._tokens.wait_s(num_tokens, now_s)
            if wait_s:
                got = f" This request needs about {num_tokens} tokens (prompt and answer)."
                return _rate_refusal(rule.name, "tokens_per_minute", rule.tokens_per_minute, got, wait_s)
        return None

    def take(self, num_requests: int, num_tokens: int, now_s: float) -> None:
        """Charge a request, or correct what was charged (`num_tokens` may be negative)."""
        if num_requests:
            self._requests.take(num_requests, now_s)
        self._tokens.take(num_tokens, now_s)

    def give_back(self, num_tokens: int) -> None:
        """A request that was taken was not served: its tokens are not used."""
        self._tokens.give_back(num_tokens)

    def too_many_held(self, endpoint: str, num_held: int, retry_after_s: int) -> Refusal:
        """Return the refusal of a request beyond max_queued."""
        message = (
            f"{num_held} requests of tenant `{self.rule.name}` wait for `{endpoint}`: limits.max_queued is "
            f"{self.rule.max_queued}. Try again in {retry_after_s} s, or send fewer at a time."
        )
        return Refusal(message, "rate_limit_exceeded", retry_after_s)

    # ---- concurrency

    def has_room(self) -> bool:
        """Whether one more request may be bound."""
        limit = self.rule.max_concurrent
        return not limit or self.num_bound + self.num_elsewhere < limit

    def bind(self, replica_id: str) -> None:
        """One of its requests is bound to a replica."""
        self._bound[replica_id] = self._bound.get(replica_id, 0) + 1
        self.num_bound += 1

    def free(self, replica_id: str) -> None:
        """One of those has ended."""
        left = self._bound[replica_id] - 1
        if left:
            self._bound[replica_id] = left
        else:
            del self._bound[replica_id]
        self.num_bound -= 1

    def observe(self, replica_id: str, num_open: int) -> None:
        """Take how many requests of this tenant a replica has open: those beyond ours are others'."""
        others = max(0, num_open - self._bound.get(replica_id, 0))
        self.num_elsewhere += others - self._elsewhere.get(replica_id, 0)
        if others:
            self._elsewhere[replica_id] = others
        else:
            self._elsewhere.pop(replica_id, None)

    def check_integrity(self) -> None:
        """Raise AssertionError, showing the sum, if a slot leaked."""
        bound, elsewhere = sum(self._bound.values()), sum(self._elsewhere.values())
        assert bound == self.num_bound >= 0, f"{self.rule.name}: {self._bound} != {self.num_bound} bound"
        assert elsewhere == self.num_elsewhere >= 0, (
            f"{self.rule.name}: {self._elsewhere} != {self.num_elsewhere} elsewhere"
        )


def _rate_refusal(tenant: str, limit: str, value: int, got: str, wait_s: float) -> Refusal:
    seconds = max(MIN_RETRY_AFTER_S, math.ceil(min(wait_s, MAX_RETRY_AFTER_S)))
    what = limit.partition("_")[0]
    message = (
        f"Rate limit reached for tenant `{tenant}` on {what} per minute: limits.{limit} is {value}."
        f"{got} Try again in {seconds} s, or ask for a higher limit."
    )
    return Refusal(message, "rate_limit_exceeded", seconds)
