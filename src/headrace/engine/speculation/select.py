"""Builds the speculation that an engine's spec names. Must not know requests or steps."""

from __future__ import annotations

from headrace.api.messages import EngineSpec
from headrace.engine.speculation.ngram import NgramProposer
from headrace.engine.speculation.proposer import Proposer
from headrace.engine.speculation.speculator import Speculator
from headrace.errors import ConfigError


def select_speculator(spec: EngineSpec) -> Speculator | None:
    """Return what guesses tokens, or None if it is off. Raises ConfigError."""
    if spec.speculation == "off":
        return None
    proposer: Proposer
    if spec.speculation == "ngram":
        proposer = NgramProposer()
    else:
        raise ConfigError(["speculation.method is draft; it must be off or ngram"])
    return Speculator(proposer, spec.max_draft_tokens)
