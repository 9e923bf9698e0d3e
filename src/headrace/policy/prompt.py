"""What the router may know of a prompt: chained hashes of its head, its size, its session. Pure.

The front computes the same hashes over the same bytes, so that its reports and the router's index speak of
the same prefixes. Must not know tokens, tokenizers or replicas.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PromptHead:
    """One request's prompt as far as the router sees it."""

    hashes: tuple[int, ...] = ()
    """64-bit hash of each full block of the prompt's head and all before it, tenant's salt included."""
    num_bytes: int = 0
    """Size of the prompt, about: the body's size."""
    session: str = ""
    """Who asked before may be served where the context is. Empty: unknown."""
    max_output_tokens: int = 0
    """What the request allows, as far as the head says so; 0: unknown."""
