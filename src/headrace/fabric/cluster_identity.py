"""From the cluster's secret to the key and certificate that its hosts show each other.

The same secret gives the same bytes on every host: nothing has to be signed, sent or renewed. Whoever has the
secret is a host; a new secret is a new cluster. Must not know connections, or how the secret travels.
Sources: RFC 5869 (HKDF), RFC 8032 (Ed25519, whose signatures are deterministic), RFC 5280.
"""

from __future__ import annotations

import os
import secrets
from datetime import UTC, datetime
from pathlib import Path

from headrace.errors import ConfigError, HeadraceError

SECRET_BYTES = 32
_PURPOSE = b"headrace cluster identity, version 1"
_NOT_BEFORE = datetime(2020, 1, 1, tzinfo=UTC)
_NOT_AFTER = datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC)
"""No end, in the words of RFC 5280 (4.1.2.5): the secret is what is replaced."""


def make_secret() -> bytes:
    """Return the secret of a new cluster."""
    return secrets.token_bytes(SECRET_BYTES)


def identity_pem(secret: bytes) -> bytes:
    """Return the private key and the certificate that `secret` stands for, as PEM.

    Raises ConfigError if the secret is short, HeadraceError if the library that signs is not installed.
    """
    if len(secret) < SECRET_BYTES:
        raise ConfigError(
            f"the cluster's secret has {len(secret)} bytes; it must have at least {SECRET_BYTES}"
        )
    try:
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes, serialization
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
        from cryptography.hazmat.primitives.kdf.hkdf import HKDF
    except ImportError:
        raise HeadraceError("several hosts need another package: pip install 'headrace[ray]'") from None
    seed = HKDF(hashes.SHA256(), length=32, salt=None, info=_PURPOSE).derive(secret)
    key = Ed25519PrivateKey.from_private_bytes(seed)
    public = key.public_key()
    name = x509.Name([x509.NameAttribute(x509.oid.NameOID.COMMON_NAME, "headrace cluster")])
    usage = x509.KeyUsage(
        digital_signature=True,
        key_cert_sign=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        crl_sign=False,
        encipher_only=False,
        decipher_only=False,
    )
    subject_id = x509.SubjectKeyIdentifier.from_public_key(public)
    certificate = (
        x509.CertificateBuilder(subject_name=name, issuer_name=name, public_key=public, serial_number=1)
        .not_valid_before(_NOT_BEFORE)
        .not_valid_after(_NOT_AFTER)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(subject_id, critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(subject_id), critical=False
        )
        .sign(key, algorithm=None)
    )
    pem = serialization.Encoding.PEM
    return key.private_bytes(
        pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    ) + certificate.public_bytes(pem)


def write_identity(secret: bytes, path: Path) -> None:
    """Write the identity for processes of this host to read, for their owner alone. Raises OSError."""
    keep_identity(identity_pem(secret), path)


def keep_identity(pem: bytes, path: Path) -> None:
    """Write an identity that was derived already. Who reads `path` meanwhile gets the old or the new one.
    Raises OSError."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        os.fchmod(file.fileno(), 0o600)  # it may have been there already
        file.write(pem)
    os.replace(draft, path)
