"""What a config may say of the address that is asked for notices. Pure.

Must not know who asks it.
"""

from __future__ import annotations

import re
from urllib.parse import urlsplit

MAX_HEADERS = 16
MAX_LENGTH = 2000
_HEADER_NAME = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]{1,100}")
_PRINTABLE = re.compile(r"[\x21-\x7e]*")
_VALUE = re.compile(r"[\x20-\x7e]*")
_SECRET = re.compile(r"authorization|cookie|token|secret|password|api-?key", re.IGNORECASE)
_OURS = {"host", "connection", "content-length", "transfer-encoding", "accept-encoding", "upgrade", "expect"}


def checked_notice_url(value: str) -> str:
    """Return the address. Raises ValueError if it is no http(s) address that may be logged."""
    if not value:
        return value
    try:
        parts = urlsplit(value)
        port = parts.port
    except ValueError as error:
        raise ValueError(f"notice_url is no address: {error}") from error
    is_address = parts.scheme in ("http", "https") and parts.hostname and port != 0
    if not is_address or len(value) > MAX_LENGTH or not _PRINTABLE.fullmatch(value):
        raise ValueError(
            f"notice_url must be http://host/path or https://host/path in ASCII, at most {MAX_LENGTH} "
            "characters, or empty"
        )
    if parts.username is not None or parts.password is not None or parts.fragment:
        raise ValueError("notice_url must have no user, password or #fragment")
    return value


def checked_notice_headers(value: dict[str, str]) -> dict[str, str]:
    """Return the headers. Raises ValueError for those that break HTTP, or whose name sounds like a secret."""
    if len(value) > MAX_HEADERS:
        raise ValueError(f"notice_headers has {len(value)} headers; at most {MAX_HEADERS} are sent")
    for name, text in value.items():
        if not _HEADER_NAME.fullmatch(name) or name.lower() in _OURS:
            raise ValueError(f"notice_headers: {name!r} cannot be set; give another header's name")
        if _SECRET.search(name):
            raise ValueError(
                f"notice_headers: {name}: secrets are refused, because they would be seen in the arguments "
                "of replicas; let an agent that has the secret write notice_file"
            )
        if len(text) > MAX_LENGTH or not _VALUE.fullmatch(text):
            raise ValueError(
                f"notice_headers: the value of {name} must be at most {MAX_LENGTH} printable ASCII characters"
            )
    return value
