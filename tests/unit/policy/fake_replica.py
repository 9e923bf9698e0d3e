"""A replica as placement observes it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class FakeReplica:
    replica_id: str
    num_in_flight: int = 0
    num_open: int = 0
    max_open: int = 64
    num_assigned: int = 0
    num_open_elsewhere: int = 0
    max_running: int = 0
    num_waiting: int = 0
    num_free_tokens: int = -1
    prefill_token_s: float = 0.0
    decode_token_s: float = 0.0
    step_per_request_s: float = 0.0
    num_uncomputed_tokens: int = 0
