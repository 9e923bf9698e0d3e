"""Files that another process reads: each is replaced as a whole or not at all, readable by its owner only."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path


def write_files(files: Mapping[str, str]) -> None:
    """Write {path: content}, each with mode 0600 and by an atomic rename. Raises OSError."""
    for name, content in files.items():
        path = Path(name)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(content)
        temporary.replace(path)
