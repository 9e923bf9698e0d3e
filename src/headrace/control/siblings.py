"""What each front must know of the other replicas of its endpoint, to continue streams there. Pure.

Must not know what a front does with it, or how it is told.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from headrace.api.messages import ReplicaState, Sibling
from headrace.control.fleet import Slot

LOAD_PERIOD_S = 1.0
"""Loads change with every report; alone they are told at most this often."""


def siblings_of(slots: Iterable[Slot], fronts: Mapping[str, str] | None = None) -> dict[str, list[Sibling]]:
    """Return, for each replica that offers its engine to others, all others of its endpoint that do; and for
    each durable front all of them. `fronts`: the endpoints of these, by their ids."""
    by_endpoint: dict[str, list[Sibling]] = {}
    for slot in slots:
        sibling = _sibling(slot)
        if sibling is not None:
            by_endpoint.setdefault(slot.endpoint, []).append(sibling)
    for siblings in by_endpoint.values():
        siblings.sort(key=lambda sibling: sibling.replica_id)
    told = {front_id: by_endpoint.get(endpoint, []) for front_id, endpoint in (fronts or {}).items()}
    return told | {
        one.replica_id: [other for other in siblings if other is not one]
        for siblings in by_endpoint.values()
        for one in siblings
    }


def shape_of(siblings: Iterable[Sibling]) -> tuple[tuple[str, str, str, str, int, bool], ...]:
    """Return what of a list is told at once when it changes: all but the loads and a notice's countdown."""
    return tuple(
        (s.replica_id, s.peer_socket, s.stream_class, s.state, s.max_open, s.leave_by_s >= 0)
        for s in siblings
    )


def _sibling(slot: Slot) -> Sibling | None:
    report = slot.report
    if report is None or not slot.is_alive or not report.peer_socket:
        return None
    state: ReplicaState = "draining" if slot.is_stopping else report.state
    if slot.phase == "lost":
        state = "failed"  # its last word is too old to be believed
    info = report.engine_info
    return Sibling(
        slot.replica_id,
        report.peer_socket,
        report.stream_class,
        state,
        report.num_streams,
        max(0, report.max_open),
        report.leave_by_s,
        report.text_class,
        info.vocab_size if info is not None else 0,
        info.max_context_tokens if info is not None else 0,
        report.kv_place,
    )
