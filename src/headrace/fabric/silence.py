"""How long a host has said nothing to the launcher, and when it is given up for that. Pure.

Calls to a host go over connections that it already has. After an outage these come back later than the
network: TCP doubles the time before each further try (RFC 6298, section 5.5). So a host that could not be
reached and can be again is waited for; one that could be reached all the time and says nothing hangs.
"""

from __future__ import annotations

_BACK_RATIO = 2.2
"""An outage that ended within the limit is over for a connection within twice that: the next try was put off
by as long as all before it took together. The rest is for the answer."""


class Silence:
    """One silence of a host, from its last word on."""

    def __init__(self, since_s: float, lost_after_s: float) -> None:
        """lost_after_s: when it is given up, unless it came back meanwhile."""
        self._since_s, self._lost_after_s = since_s, lost_after_s
        self._was_unreachable = self._is_back = False

    def __repr__(self) -> str:
        return f"Silence(since {self._since_s:.1f} s{', it is back' * self._is_back})"

    def note_probe(self, can_reach: bool) -> None:
        """Take whether its machine could be reached just now, by a connection of its own."""
        self._was_unreachable |= not can_reach
        self._is_back = can_reach and self._was_unreachable

    def lasts_s(self, now_s: float) -> float:
        """Return the time since its last word."""
        return now_s - self._since_s

    def is_given_up(self, now_s: float) -> bool:
        """Whether nobody waits for it any more."""
        limit_s = self._lost_after_s * (_BACK_RATIO if self._is_back else 1.0)
        return self.lasts_s(now_s) >= limit_s
