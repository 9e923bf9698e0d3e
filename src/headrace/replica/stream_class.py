"""What decides an answer's tokens, as one word: engines of the same class continue each other's streams.

Must not know which engines there are.
"""

from __future__ import annotations

from hashlib import sha256

from headrace.api.messages import EngineReady, EngineSpec


def stream_class_of(configured: str, info: EngineReady) -> str:
    """Return the class of an engine: what the config says of it (`configured`), and what it really computes
    with. The number of threads, speculation and memory decide no token; the longest context does, at its end.
    """
    arithmetic = info.path.partition(";")[0].partition(",")[0]
    parts = [
        *(configured, info.kind, info.architecture, arithmetic),
        *(str(info.vocab_size), str(info.max_context_tokens), str(info.block_size)),
    ]
    return sha256("\n".join(parts).encode()).hexdigest()[:12]


def text_class_of(spec: EngineSpec) -> str:
    """Return what turns texts into an engine's token ids: streams may pass from front to engine within it."""
    if spec.kind == "simulated":
        return "bytes"
    return sha256(f"{spec.kind} {spec.model}".encode()).hexdigest()[:12]
