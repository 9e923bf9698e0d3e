"""What hosts are called: `GROUP#INCARNATION`, and `GROUP#INCARNATION/N` where N hosts have one reservation.

The first host of a reservation has the key of the whole; the I-th of the others, from 1, has `/I` behind it.
So a controller that comes later knows from the key alone how many there must be. Pure.
"""

from __future__ import annotations

_GROUP_END = "#"
_PART = "/"


def make_key(group: str, incarnation: str, num_hosts: int = 1) -> str:
    """Return the key of a reservation for `num_hosts` hosts. Later incarnations sort after earlier ones."""
    return f"{group}{_GROUP_END}{incarnation}" + (f"{_PART}{num_hosts}" if num_hosts > 1 else "")


def is_key(name: str) -> bool:
    """Whether `name` is that of a host."""
    return _GROUP_END in name


def group_of(key: str) -> str:
    return key.rpartition(_GROUP_END)[0]


def incarnation_of(key: str) -> str:
    return key.rpartition(_GROUP_END)[2]


def reservation_of(key: str) -> tuple[str, int]:
    """Return the key of the host's reservation, and the host's place in it: 0 for the first."""
    incarnation, *parts = incarnation_of(key).split(_PART)
    if len(parts) < 2:
        return key, 0
    return make_key(group_of(key), incarnation, int(parts[0])), int(parts[1])


def further_keys(key: str) -> list[str]:
    """Return the keys of the other hosts of a reservation, whose key is that of the first."""
    parts = incarnation_of(key).split(_PART)[1:]
    return [f"{key}{_PART}{index}" for index in range(1, int(parts[0]))] if len(parts) == 1 else []
