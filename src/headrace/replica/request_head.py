"""What a request's headers say of it: its ids, whose it is, where a router placed it.

Owns who is believed: tenant and place come from a gateway, or not at all.
Must not know bodies or engines.
"""

from __future__ import annotations

import os
import re

from headrace.api.notation import TENANT_NAME
from headrace.replica.http_messages import HttpRequest
from headrace.replica.ledger import RequestRecord

_HEADER_VALUE = re.compile(r"[\x21-\x7e]{1,256}")


def open_record(request: HttpRequest) -> RequestRecord:
    """Return the record of a request that just arrived, with its ids."""
    internal = request.headers.get("x-headrace-request-id", "")
    if not _HEADER_VALUE.fullmatch(internal):
        internal = os.urandom(12).hex()
    client = request.headers.get("x-request-id", "")
    if not _HEADER_VALUE.fullmatch(client):
        client = internal
    tenant = request.headers.get("x-headrace-tenant", "") if request.is_trusted else ""
    if not TENANT_NAME.fullmatch(tenant):
        tenant = ""
    return RequestRecord(internal, client, request.path, request.arrived_s, tenant)


def place_of(request: HttpRequest) -> str:
    """Return the replica whose engine a router named for a request; empty: none did."""
    place = request.headers.get("x-headrace-place", "") if request.is_trusted else ""
    return place if _HEADER_VALUE.fullmatch(place) else ""
