"""The public address's certificate: the user's files read, checked, and made into the one that HAProxy loads.

Owns what makes a pair usable, and the words for what does not. Must not know who asks, or HAProxy.
Source: RFC 5280 (4.1, the certificate's structure), X.690 (DER).
"""

from __future__ import annotations

import os
import re
import ssl
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from headrace.errors import ConfigError

MAX_FILE_BYTES = 65_536
_BLOCK = re.compile(r"-----BEGIN ([A-Z0-9 ]+)-----\s.*?-----END \1-----", re.DOTALL)
_SEQUENCE, _VERSION, _UTC_TIME, _GENERALIZED_TIME = 0x30, 0xA0, 0x17, 0x18


def load_certificate(certificate: str, key: str, wall_s: float) -> str:
    """Return certificate, chain and key as one PEM text without blank lines.

    wall_s: now, in seconds since 1970. Raises ConfigError that names the file and says what to do.
    """
    chain = [text for kind, text in _blocks("certificate", certificate) if kind == "CERTIFICATE"]
    keys = [text for kind, text in _blocks("key", key) if kind.endswith("PRIVATE KEY")]
    if not chain:
        raise _problem("certificate", certificate, "holds no CERTIFICATE block; give a PEM file")
    if len(keys) != 1:
        raise _problem("key", key, f"holds {len(keys)} private keys; give a PEM file with one")
    if "ENCRYPTED" in keys[0]:
        raise _problem("key", key, "is encrypted; nobody is there to type its password: decrypt it")
    _check_validity(certificate, chain[0], wall_s)
    pem = "".join(f"{_without_blank_lines(block)}\n" for block in (*chain, keys[0]))
    _check_pair(certificate, key, pem)
    return pem


def valid_until(pem: str) -> float:
    """Return when the first certificate of a PEM text ends, in seconds since 1970. Raises ValueError."""
    block = _BLOCK.search(pem)
    return _validity(ssl.PEM_cert_to_DER_cert(block[0]) if block else b"")[1]


def _problem(setting: str, path: str, what: str) -> ConfigError:
    return ConfigError(f"gateway.tls.{setting}: {path} {what}")


def _blocks(setting: str, path: str) -> list[tuple[str, str]]:
    try:
        with open(path, encoding="ascii", errors="replace") as file:
            text = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise _problem(setting, path, f"cannot be read: {error.strerror or error}") from None
    if len(text) > MAX_FILE_BYTES:
        raise _problem(setting, path, f"has more than {MAX_FILE_BYTES} bytes; it is no PEM file of ours")
    return [(match[1], match[0]) for match in _BLOCK.finditer(text)]


def _without_blank_lines(block: str) -> str:
    """An empty line would end HAProxy's command early."""
    return "\n".join(line.strip() for line in block.splitlines() if line.strip())


def _check_validity(path: str, block: str, wall_s: float) -> None:
    try:
        begins_s, ends_s = _validity(ssl.PEM_cert_to_DER_cert(block))
    except ValueError as error:
        raise _problem("certificate", path, f"is damaged: {error}") from None
    if wall_s > ends_s:
        raise _problem("certificate", path, f"expired on {_date(ends_s)}; put a renewed one there")
    if wall_s < begins_s:
        raise _problem(
            "certificate", path, f"is not valid before {_date(begins_s)}; look at this machine's clock"
        )


def _check_pair(certificate: str, key: str, pem: str) -> None:
    """Have OpenSSL load the pair. From memory: what is checked is what will be used, and no copy of the key
    is left anywhere."""
    descriptor = os.memfd_create("certificate", os.MFD_CLOEXEC)
    try:
        os.write(descriptor, pem.encode("ascii"))
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(
            Path("/proc/self/fd") / str(descriptor), password=lambda: ""
        )
    except ssl.SSLError as error:
        if "MISMATCH" in str(error).upper():
            raise _problem("key", key, f"is not the key of {certificate}; give the two of one pair") from None
        raise _problem("certificate", certificate, f"cannot be used with {key}: {error}") from None
    except OSError as error:
        raise _problem("certificate", certificate, f"cannot be checked: {error}") from None
    finally:
        os.close(descriptor)


def _date(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")


# ---- DER, as much of it as the validity needs


def _validity(der: bytes) -> tuple[float, float]:
    """Return (not before, not after) in seconds since 1970. Raises ValueError."""
    offset, _ = _enter(der, 0, _SEQUENCE)  # Certificate
    offset, _ = _enter(der, offset, _SEQUENCE)  # TBSCertificate
    if der[offset : offset + 1] == bytes((_VERSION,)):
        offset = _skip(der, offset)
    for _ in range(3):  # serial number, signature algorithm, issuer
        offset = _skip(der, offset)
    offset, _ = _enter(der, offset, _SEQUENCE)  # Validity
    begins_s = _time(der, offset)
    return begins_s, _time(der, _skip(der, offset))


def _element(der: bytes, offset: int) -> tuple[int, int, int]:
    """Return (tag, start of the content, its end). Raises ValueError if it reaches past the end."""
    if offset + 2 > len(der):
        raise ValueError("its structure is cut off")
    tag, length = der[offset], der[offset + 1]
    offset += 2
    if length & 0x80:
        num_bytes = length & 0x7F
        length = int.from_bytes(der[offset : offset + num_bytes], "big")
        offset += num_bytes
    if offset + length > len(der):
        raise ValueError("its structure is cut off")
    return tag, offset, offset + length


def _enter(der: bytes, offset: int, wanted: int) -> tuple[int, int]:
    tag, start, end = _element(der, offset)
    if tag != wanted:
        raise ValueError("it is not an X.509 certificate")
    return start, end


def _skip(der: bytes, offset: int) -> int:
    return _element(der, offset)[2]


def _time(der: bytes, offset: int) -> float:
    tag, start, end = _element(der, offset)
    text = der[start:end].decode("ascii", "replace")
    with suppress(ValueError):
        if tag == _GENERALIZED_TIME:
            return datetime.strptime(text, "%Y%m%d%H%M%SZ").replace(tzinfo=UTC).timestamp()
        if tag == _UTC_TIME:
            century = "20" if int(text[:2]) < 50 else "19"  # RFC 5280, 4.1.2.5.1
            return datetime.strptime(century + text, "%Y%m%d%H%M%SZ").replace(tzinfo=UTC).timestamp()
    raise ValueError("its validity is not a time")
