"""When held requests of an endpoint can expect a replica, and what is waited for. Pure.

Must not know what routers tell clients of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from headrace.api.endpoint_config import Endpoint
from headrace.api.messages import EndpointOutlook
from headrace.control.fleet import Slot
from headrace.control.notices import HoldOff
from headrace.control.slots import FAILED_RETRY_S, restart_delay_s
from headrace.control.start_times import DEFAULT_S, PACKED_S, StartTimes

SIMULATED_FRONT_S = 0.7
"""What a simulated replica takes besides its engine's start_s."""
UNKNOWN_S = -1.0
_Expected = tuple[float, str]


def outlook_of(
    endpoint: str,
    section: Endpoint,
    slots: Sequence[Slot],
    times: StartTimes,
    now_s: float,
    hold_off: HoldOff | None = None,
) -> EndpointOutlook:
    """Return when a replica of `endpoint` is expected. At zero: how long the first request would wait.

    section: what its replicas are started with. slots: its own, phases as last observed. hold_off: nothing
    is started now.
    """
    if any(slot.phase == "ready" for slot in slots):
        return EndpointOutlook(endpoint, 0.0)
    if hold_off is not None and not any(slot.phase in ("starting", "standby") for slot in slots):
        start_s = times.expected_s("cold", default_start_s(section))
        return EndpointOutlook(endpoint, hold_off.left_s + start_s, hold_off.reason)
    known = [expected for slot in slots if (expected := _expected(slot, section, times, now_s)) is not None]
    if known:
        eta_s, reason = min(known)
        return EndpointOutlook(endpoint, eta_s, reason)
    waiting = [slot for slot in slots if slot.phase != "draining"]
    if not waiting:
        reason = "its replicas leave; another one starts then" if slots else "a request starts a replica"
        return EndpointOutlook(endpoint, times.expected_s("cold", default_start_s(section)), reason)
    return EndpointOutlook(endpoint, UNKNOWN_S, "; ".join(sorted(map(_obstacle, waiting))))


def default_start_s(section: Endpoint, phase: str = "") -> float:
    """What a cold start is expected to take before any was measured. phase: what it does now."""
    if section.engine == "simulated":
        return section.simulated.start_s + SIMULATED_FRONT_S
    return PACKED_S if "packed" in phase and phase.startswith("mapping") else DEFAULT_S["cold"]


def is_news(before: Iterable[EndpointOutlook], now: Iterable[EndpointOutlook]) -> bool:
    """Whether something else is waited for than before, not just for less long."""

    def shape(outlooks: Iterable[EndpointOutlook]) -> list[tuple[str, bool, bool, str]]:
        return [(o.endpoint, o.eta_s > 0, o.eta_s < 0, o.reason) for o in outlooks]

    return shape(before) != shape(now)


def _expected(slot: Slot, section: Endpoint, times: StartTimes, now_s: float) -> _Expected | None:
    """When one slot's replica serves, if it can be said."""
    phase = slot.report.phase if slot.report is not None else ""
    default_s = default_start_s(section, phase)
    wake_s = times.expected_s("standby")
    match slot.phase:
        case "starting":
            remaining_s = times.remaining_s("cold", now_s - slot.started_s, default_s)
            wake_s = wake_s if slot.role == "standby" else 0.0
            return remaining_s + wake_s, f"{slot.replica_id} starts ({phase or 'its process'})"
        case "standby" if slot.role == "serving" and slot.change_since_s is not None:
            return times.remaining_s("standby", now_s - slot.change_since_s), f"{slot.replica_id} wakes"
        case "standby" if slot.role == "standby":
            return wake_s, f"{slot.replica_id} is on standby"
        case "pending":
            delay_s = restart_delay_s(slot.failures) if slot.failures else 0.0
            start_s = times.expected_s("cold", default_s)
            error = f" after: {slot.last_error}" if slot.failures else ""
            return max(
                0.0, slot.ended_s + delay_s - now_s
            ) + start_s, f"{slot.replica_id} is started again{error}"
    return None


def _obstacle(slot: Slot) -> str:
    if slot.role == "resting":
        return f"{slot.replica_id} was put to sleep; `headrace wake {slot.replica_id}` wakes it"
    error = f": {slot.last_error}" if slot.last_error else ""
    retry = f", retried every {FAILED_RETRY_S:.0f} s" if slot.phase == "failed" else ""
    return f"{slot.replica_id} is {slot.phase}{retry}{error}"
