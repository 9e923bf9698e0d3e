"""Which files a model consists of, as they are now: what tells packed weights of other files apart.

Reads a little of each file. Must not know formats, tensors or torch.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import xxhash

from headrace.engine.model_files.resolve import ModelFiles
from headrace.errors import ModelError

_NUM_SAMPLES = 64
_SAMPLE_BYTES = 16 * 1024


def stamp_files(files: ModelFiles) -> list[dict[str, Any]]:
    """Return path, size, time of change and a checksum of samples of each file that decides the weights.

    Samples from all over the file (1 MiB together) tell files apart that were copied with their times.
    Raises ModelError for a file that cannot be read.
    """
    if files.format == "gguf":
        return [_stamp(files.path)]
    names = {"config.json", "model.safetensors.index.json"}
    paths = [
        path for path in files.path.iterdir() if path.name in names or path.name.endswith(".safetensors")
    ]
    return [_stamp(path) for path in sorted(paths)]


def _stamp(path: Path) -> dict[str, Any]:
    try:
        real = path.resolve()
        with real.open("rb") as file:
            status = os.fstat(file.fileno())
            digest = xxhash.xxh3_128()
            last = max(status.st_size - _SAMPLE_BYTES, 0)
            for index in range(_NUM_SAMPLES):
                digest.update(os.pread(file.fileno(), _SAMPLE_BYTES, last * index // (_NUM_SAMPLES - 1)))
    except (OSError, RuntimeError) as error:  # RuntimeError: links that lead to themselves
        reason = getattr(error, "strerror", None) or error
        raise ModelError(f"{path}: cannot be read: {reason}") from error
    return {
        "path": os.fsencode(real).decode("utf-8", "backslashreplace"),
        "size": status.st_size,
        "mtime_ns": status.st_mtime_ns,
        "samples": digest.hexdigest(),
    }
