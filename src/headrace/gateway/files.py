"""Files that another process reads: each is replaced as a whole or not at all, readable by its owner only."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path


def write_files(files: Mapping[str, str]) -> None:
    """Write {path: content}, each with mode 0600 and by an atomic rename; make their directory if it
    is missing, but not the one above. Raises OSError."""
    for name, content in files.items():
        path = Path(name)
        path.parent.mkdir(mode=0o700, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(content)
        temporary.replace(path)
