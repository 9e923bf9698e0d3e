"""One endpoint in the router: its rule, fair queue, placer and counters, and each tenant's account at it.

Must not know requests' answers, sockets, or a tenant's limits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from headrace.api.messages import (
    EndpointDemand,
    EndpointRule,
    FinishedRequest,
    TenantDemand,
    TerminalState,
    VersionDemand,
)
from headrace.gateway.versions import VersionBook
from headrace.policy.admission import HeldRequest, retry_after_s
from headrace.policy.fairness import FairQueue
from headrace.policy.limits import Refusal
from headrace.policy.placement import Placer
from headrace.policy.work import FIRST_OUTPUT_TOKENS, LengthMean, WorkModel

_RATE_DECAY = 0.8
SHARE_MEMORY_S = 60.0
"""`TenantDemand.share` looks back about this long."""


@dataclass(slots=True)
class TenantAccount:
    """What one tenant did at one endpoint. Totals count since the router's start, this router's alone."""

    tenant: str
    arrived: int = 0
    num_in_flight: int = 0
    finished: int = 0
    refused: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    work_s: float = 0.0
    recent_work_s: float = 0.0
    """Work of all routers, fading over SHARE_MEMORY_S."""
    output: LengthMean = field(default_factory=lambda: LengthMean(FIRST_OUTPUT_TOKENS))

    def end(self, state: TerminalState) -> None:
        if state is TerminalState.FINISHED:
            self.finished += 1
        elif state is TerminalState.REFUSED:
            self.refused += 1


@dataclass(slots=True)
class EndpointState:
    """One endpoint's rule, queue and counters."""

    rule: EndpointRule
    queue: FairQueue
    placer: Placer
    arrived: int = 0
    num_in_flight: int = 0
    ended: dict[TerminalState, int] = field(default_factory=lambda: dict.fromkeys(TerminalState, 0))
    served_per_s: float = 0.0
    num_served_in_second: int = 0
    work: WorkModel = field(default_factory=WorkModel)
    accounts: dict[str, TenantAccount] = field(default_factory=dict)
    """By tenant; bounded by the tenants that there are."""
    over_limits: int = 0
    arrived_prompt_tokens: float = 0.0
    held_prompt_tokens: int = 0
    """Estimated, of the requests held now."""
    measured: int = 0
    """Own requests that ended with tokens, each counted once, and what their fronts measured of them."""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    engine_s: float = 0.0
    versions: VersionBook = field(default_factory=VersionBook)

    def __post_init__(self) -> None:
        self.queue.second = self.work.second

    def observe_costs(self, prefill_token_s: float, decode_token_s: float, now_s: float) -> None:
        """Take what one of its engines measured per token; 0: nothing yet."""
        self.work.observe_costs(prefill_token_s, decode_token_s, now_s)
        self.queue.second = self.work.second

    def account(self, tenant: str) -> TenantAccount:
        """Return the tenant's account; opened on first use."""
        account = self.accounts.get(tenant)
        if account is None:
            account = self.accounts[tenant] = TenantAccount(tenant)
        return account

    def count_measured(self, finished: FinishedRequest) -> None:
        """Take what a request of this router was found to be, once, when that is known."""
        self.measured += 1
        self.prompt_tokens += finished.num_prompt_tokens
        self.cached_tokens += finished.num_cached_tokens
        self.output_tokens += finished.num_output_tokens
        self.engine_s += finished.engine_s

    def retry_after_s(self, num_ahead: int) -> int:
        """When to come again, in seconds, with so many requests ahead."""
        return retry_after_s(num_ahead, self.served_per_s)

    def full(self) -> Refusal:
        """Return the refusal of a request for which the queue has no place."""
        seconds = self.retry_after_s(len(self.queue))
        return Refusal.unavailable(
            f"{len(self.queue)} requests wait for `{self.rule.name}`, the limit (queue.max_requests). "
            f"Try again in {seconds} s.",
            "queue_full",
            seconds,
        )

    def waited_too_long(self, request: HeldRequest) -> Refusal:
        """Return the refusal of a request that was held to the limit."""
        limit_s, setting = self.rule.max_wait_s, "queue.max_wait_s"
        own_s = self.queue.share(request.tenant).max_wait_s
        if 0 < own_s < limit_s:
            limit_s, setting = own_s, f"limits.max_wait_s of tenant `{request.tenant}`"
        seconds = self.retry_after_s(len(self.queue))
        return Refusal.unavailable(
            f"No replica of `{self.rule.name}` had room for {limit_s:g} s ({setting}). "
            f"Try again in {seconds} s.",
            "overloaded",
            seconds,
        )

    def update_rates(self, elapsed_s: float) -> None:
        """A second is over: smooth the rate, let work fade."""
        rate = self.num_served_in_second / elapsed_s
        self.served_per_s = rate + (self.served_per_s - rate) * _RATE_DECAY
        self.num_served_in_second = 0
        keep = math.exp(-min(elapsed_s, SHARE_MEMORY_S) / SHARE_MEMORY_S)
        for account in self.accounts.values():
            account.recent_work_s *= keep

    def demand(self, now_s: float) -> EndpointDemand:
        ended = self.ended
        return EndpointDemand(
            endpoint=self.rule.name,
            num_held=len(self.queue),
            oldest_held_s=self.queue.oldest_s(now_s),
            num_in_flight=self.num_in_flight,
            arrived=self.arrived,
            finished=ended[TerminalState.FINISHED],
            aborted=ended[TerminalState.ABORTED],
            refused=ended[TerminalState.REFUSED],
            failed=ended[TerminalState.FAILED],
            arrived_prompt_tokens=self.arrived_prompt_tokens,
            prompt_tokens=self.prompt_tokens,
            cached_tokens=self.cached_tokens,
            output_tokens=self.output_tokens,
            engine_s=self.engine_s,
            held_prompt_tokens=float(self.held_prompt_tokens),
            over_limits=self.over_limits,
            measured=self.measured,
        )

    def version_demands(self) -> list[VersionDemand]:
        """Return how each generation of its replicas fares."""
        return self.versions.demands(self.rule.name)

    def tenant_demands(self, now_s: float, max_tenants: int) -> list[TenantDemand]:
        """Return each tenant's part; of more than `max_tenants` those with the most to show for it now."""
        accounts = list(self.accounts.values())
        total_s = sum(account.recent_work_s for account in accounts)
        if len(accounts) > max_tenants:
            accounts.sort(key=self._activity, reverse=True)
            del accounts[max_tenants:]
        return [
            TenantDemand(
                endpoint=self.rule.name,
                tenant=account.tenant,
                num_held=self.queue.num_held(account.tenant),
                oldest_held_s=self.queue.oldest_s(now_s, account.tenant),
                num_in_flight=account.num_in_flight,
                arrived=account.arrived,
                finished=account.finished,
                refused=account.refused,
                prompt_tokens=account.prompt_tokens,
                output_tokens=account.output_tokens,
                work_s=account.work_s,
                share=account.recent_work_s / total_s if total_s > 0 else 0.0,
            )
            for account in accounts
        ]

    def _activity(self, account: TenantAccount) -> tuple[int, float]:
        return self.queue.num_held(account.tenant) + account.num_in_flight, account.recent_work_s
