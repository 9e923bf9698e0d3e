"""What each request is expected to cost its tenant, and what it did cost; each tenant's limits.

Owns the charges: to the tenant's counter in the endpoint's fair queue and to its buckets, expected first,
corrected by the front's word, once per request, whichever gateway it came through.
Must not know which request is bound when (`dispatcher`), nor how anything is answered.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping

import msgspec

from headrace.api.messages import FinishedRequest, TenantRule, TerminalState
from headrace.gateway.endpoint_state import EndpointState, TenantAccount
from headrace.policy.limits import TenantLimits
from headrace.policy.prompt import PromptHead
from headrace.policy.virtual_counters import Share
from headrace.policy.work import MAX_TOKENS

MAX_ELSEWHERE_REMEMBERED = 65_536
"""Requests of other gateways that were charged here, kept so that a second report charges nothing."""


class Charge(msgspec.Struct, gc=False):
    """What a request was charged so far: expected, then, when settled, measured."""

    tenant: str
    limits: TenantLimits | None
    account: TenantAccount | None
    num_bytes: int = 0
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    num_tokens: int = 0
    """Taken from the token bucket."""
    work: float = 0.0
    """Charged to the fair queue."""
    is_settled: bool = False
    is_judged: bool = False
    """Counted for the version of the replica that it was bound to."""
    generation: str = ""
    """That version, where its front is none of the replica's: reports do not tell it then."""

    def judge(self, endpoint: EndpointState, finished: FinishedRequest, generation: str) -> None:
        """Count for the version that answered, once, by its front's first word on the end."""
        if not self.is_judged:
            self.is_judged = True
            endpoint.versions.count(self.generation or generation, finished, endpoint.rule)

    def judge_failed(self, endpoint: EndpointState, generation: str) -> None:
        """Count as broken off, unless its front said something else before: it may never say anything."""
        if not self.is_judged:
            self.is_judged = True
            endpoint.versions.count_failure(generation)


class TenantBook:
    """All tenants of one router. Without rules there is one, named ``, without limits."""

    def __init__(self, rules: Iterable[TenantRule] = ()) -> None:
        self.limits: dict[str, TenantLimits] = {}
        self.shares: dict[str, Share] = {}
        self._reported: dict[str, Mapping[str, int]] = {}
        self._elsewhere: OrderedDict[str, None] = OrderedDict()
        self.num_ignored = 0
        """Reports of a request's end that made no sense; what was expected stays charged."""
        self.set_rules(rules, 0.0)

    def __repr__(self) -> str:
        return f"<TenantBook {len(self.limits)} tenants>"

    # ---- rules

    def set_rules(self, rules: Iterable[TenantRule], now_s: float) -> list[str]:
        """Take new rules; return the tenants that are gone."""
        wanted = {rule.name: rule for rule in rules} or {"": TenantRule("")}
        gone = [name for name in self.limits if name not in wanted]
        for name in gone:
            del self.limits[name]
        for name, rule in wanted.items():
            if name in self.limits:
                self.limits[name].set_rule(rule, now_s)
            else:
                limits = self.limits[name] = TenantLimits(rule)
                for replica_id, counts in self._reported.items():
                    limits.observe(replica_id, counts.get(name, 0))
        self.shares = {
            name: Share(rule.weight, rule.priority, rule.max_wait_s) for name, rule in wanted.items()
        }
        return gone

    # ---- charges

    def expect(self, endpoint: EndpointState, prompt: PromptHead, limits: TenantLimits) -> Charge:
        """Return what a request will probably cost. Charges nothing yet."""
        tenant = limits.rule.name
        account = endpoint.account(tenant)
        num_prompt = endpoint.work.expected_prompt_tokens(prompt)
        num_output = endpoint.work.expected_output_tokens(prompt, account.output)
        return Charge(
            tenant, limits, account, prompt.num_bytes, num_prompt, num_output, num_prompt + num_output
        )

    def charge_bound(self, endpoint: EndpointState, charge: Charge, cached_ratio: float) -> float:
        """A request is bound where `cached_ratio` of its prompt is cached: return the work to charge."""
        if charge.is_settled:  # in an earlier pass, which cost something
            return 0.0
        uncached = charge.num_prompt_tokens * (1 - min(1.0, max(0.0, cached_ratio)))
        charge.work = endpoint.work.work(uncached, charge.num_output_tokens)
        account = charge.account
        if account is not None:
            account.work_s += charge.work
            account.recent_work_s += charge.work
        return charge.work

    def expect_again(self, endpoint: EndpointState, charge: Charge, now_s: float) -> None:
        """A request that was bound is to be bound once more: what that charged is given back, as if it had
        been held all the time. What fronts have measured stays, once."""
        account, num_tokens = charge.account, charge.num_prompt_tokens + charge.num_output_tokens
        if charge.is_settled or account is None or charge.limits is None:
            return
        endpoint.queue.charge(charge.tenant, -charge.work)
        account.work_s -= charge.work
        account.recent_work_s = max(0.0, account.recent_work_s - charge.work)
        charge.limits.take(0, num_tokens - charge.num_tokens, now_s)
        charge.work, charge.num_tokens = 0.0, num_tokens

    def settle(
        self, endpoint: EndpointState, charge: Charge, finished: FinishedRequest, now_s: float
    ) -> None:
        """Put what was measured in place of what was expected. A report without tokens gives back, but a
        later one still counts: the request may have been retried at another replica."""
        if charge.is_settled or not self._makes_sense(finished):
            return
        num_prompt, num_output = finished.num_prompt_tokens, finished.num_output_tokens
        charge.is_settled = num_prompt + num_output > 0
        if charge.is_settled:
            endpoint.count_measured(finished)
        work = _measured(endpoint, finished)
        is_unseen = charge.account is None
        if charge.account is None:  # HAProxy served it without asking: only the front knows whose it was
            charge.limits = self.limits.get(finished.tenant)
            if charge.limits is None:
                return
            charge.tenant, charge.account = finished.tenant, endpoint.account(finished.tenant)
            endpoint.arrived_prompt_tokens += num_prompt
            endpoint.queue.charge_elsewhere(charge.tenant, work)
        else:
            endpoint.queue.charge(charge.tenant, work - charge.work)
        account = charge.account
        account.work_s += work - charge.work
        account.recent_work_s = max(0.0, account.recent_work_s + work - charge.work)
        account.prompt_tokens += num_prompt
        account.output_tokens += num_output
        if charge.limits is not None:
            charge.limits.take(int(is_unseen), num_prompt + num_output - charge.num_tokens, now_s)
        charge.work, charge.num_tokens = work, num_prompt + num_output
        if finished.state is TerminalState.FINISHED:
            endpoint.work.learn(charge.num_bytes, num_prompt)
            endpoint.work.output.learn(num_output)
            account.output.learn(num_output)

    def charge_elsewhere(self, endpoint: EndpointState, finished: FinishedRequest, now_s: float) -> None:
        """Charge a request that another gateway bound, or this one's router before its restart. Once."""
        limits = self.limits.get(finished.tenant)
        num_tokens = finished.num_prompt_tokens + finished.num_output_tokens
        if limits is None or num_tokens == 0 or finished.request_id in self._elsewhere:
            return
        if not self._makes_sense(finished):
            return
        self._elsewhere[finished.request_id] = None
        if len(self._elsewhere) > MAX_ELSEWHERE_REMEMBERED:
            self._elsewhere.popitem(last=False)
        work = _measured(endpoint, finished)
        endpoint.queue.charge_elsewhere(finished.tenant, work)
        limits.take(1, num_tokens, now_s)
        endpoint.account(finished.tenant).recent_work_s += work

    def give_back(self, charge: Charge) -> None:
        """A held request ends unserved: its tokens are not used."""
        if charge.limits is not None:
            charge.limits.give_back(charge.num_tokens)
        charge.num_tokens = 0

    # ---- what others have open

    def observe_open(self, replica_id: str, open_by_tenant: Mapping[str, int]) -> list[TenantLimits]:
        """Take a replica's open requests by tenant; return the passed-over tenants that have room now."""
        before = self._reported.get(replica_id, {})
        if open_by_tenant:
            self._reported[replica_id] = open_by_tenant
        else:
            self._reported.pop(replica_id, None)
        with_room = []
        for name in {*before, *open_by_tenant}:
            limits = self.limits.get(name)
            if limits is not None:
                limits.observe(replica_id, open_by_tenant.get(name, 0))
                if limits.is_passed_over and limits.has_room():
                    with_room.append(limits)
        return with_room

    def forget_replicas(self, known: Iterable[str]) -> list[TenantLimits]:
        """Forget what replicas reported that are gone; return as `observe_open` does."""
        gone = self._reported.keys() - set(known)
        return [limits for replica_id in gone for limits in self.observe_open(replica_id, {})]

    def check_integrity(self, bound: Iterable[TenantLimits | None]) -> None:
        """Raise AssertionError if a slot leaked. `bound`: the tenant of each request that holds one."""
        counts = Counter(id(limits) for limits in bound)
        for name, limits in self.limits.items():
            limits.check_integrity()
            count = counts[id(limits)]
            assert count == limits.num_bound, f"{name}: {count} hold slots != {limits.num_bound} counted"

    def _makes_sense(self, finished: FinishedRequest) -> bool:
        num_prompt, num_cached = finished.num_prompt_tokens, finished.num_cached_tokens
        is_sane = (
            0 <= num_cached <= num_prompt <= MAX_TOKENS and 0 <= finished.num_output_tokens <= MAX_TOKENS
        )
        self.num_ignored += not is_sane
        return is_sane


def _measured(endpoint: EndpointState, finished: FinishedRequest) -> float:
    num_uncached = finished.num_prompt_tokens - finished.num_cached_tokens
    return endpoint.work.measured(
        finished.engine_s, finished.total_s, num_uncached, finished.num_output_tokens
    )
