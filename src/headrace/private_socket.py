"""A UNIX socket that only its owner may connect to.

Owns its mode from the first moment. Must not know who listens, or for what.
"""

from __future__ import annotations

import contextlib
import os
import socket


def bind_private_socket(path: str) -> socket.socket:
    """Bind a stream socket with mode 0600, in place of one that a dead listener left. It does not block, and
    does not listen yet. Raises OSError."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    previous = os.umask(0o177)  # there is no moment at which others could connect
    try:
        listener.bind(path)
    except OSError:
        listener.close()
        raise
    finally:
        os.umask(previous)
    listener.setblocking(False)
    return listener
