"""Builds the speculation that an engine's spec names, the draft model included.

Must not know requests or steps.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from headrace.api.messages import EngineSpec
from headrace.engine.model_files.metadata import ModelMetadata, read_metadata
from headrace.engine.model_files.resolve import ModelFiles, resolve_model
from headrace.engine.model_files.vocabulary import read_token_bytes
from headrace.engine.protocol import ModelRunner
from headrace.engine.runner import load_runner
from headrace.engine.speculation.draft_model import DraftModelProposer
from headrace.engine.speculation.ngram import NgramProposer
from headrace.engine.speculation.proposer import Proposer
from headrace.engine.speculation.speculator import Speculator
from headrace.errors import ConfigError

_DEFAULT_TOKENS_PER_REQUEST = 1024
"""What `kv_memory` gives each of max_running requests where no size is set."""


def load_speculator(
    spec: EngineSpec, files: ModelFiles, runner: ModelRunner, on_phase: Callable[[str], None]
) -> Speculator | None:
    """Return what guesses tokens for the model in `runner`, or None if speculation is off.

    Raises ConfigError for a draft model that does not fit, and what loading it raises.
    """
    if spec.speculation == "off":
        return None
    proposer: Proposer
    if spec.speculation == "ngram":
        proposer = NgramProposer()
    else:
        proposer = DraftModelProposer(_load_draft_model(spec, files, runner, on_phase), spec.token_budget)
    return Speculator(proposer, spec.max_draft_tokens)


def _load_draft_model(
    spec: EngineSpec, files: ModelFiles, runner: ModelRunner, on_phase: Callable[[str], None]
) -> ModelRunner:
    on_phase("finding the draft model")
    draft_files = resolve_model(spec.draft_model)
    draft_metadata = read_metadata(draft_files)
    check_same_vocabulary(read_metadata(files), draft_metadata)
    longest = min(_DEFAULT_TOKENS_PER_REQUEST, draft_metadata.hyperparameters.context_length)
    num_tokens = runner.num_blocks * runner.block_size
    draft_spec = msgspec.structs.replace(
        spec,
        model=spec.draft_model,
        # As many blocks as the large model has, whatever memory those take here.
        kv_cache_bytes=0,
        max_context_tokens=0,
        max_running=-(-num_tokens // longest),
        kv_descriptor=-1,
    )
    draft_runner = load_runner(draft_spec, draft_files, lambda phase: on_phase(f"draft model: {phase}"))
    if draft_runner.num_blocks < runner.num_blocks:
        raise ConfigError(
            f"the draft model has memory for {draft_runner.num_blocks} KV blocks and needs "
            f"{runner.num_blocks}, as many as the model; set kv_cache_mb to "
            f"{draft_runner.num_blocks / runner.num_blocks:.0%} of what it is, or lower max_running"
        )
    return draft_runner


def check_same_vocabulary(metadata: ModelMetadata, draft_metadata: ModelMetadata) -> None:
    """Raise ConfigError unless every token id means the same to both models."""
    size, draft_size = metadata.hyperparameters.vocab_size, draft_metadata.hyperparameters.vocab_size
    hint = "a draft model must have the same vocabulary: take a smaller model of the same family"
    if size != draft_size:
        raise ConfigError(
            f"draft_model {draft_metadata.name} has {draft_size} tokens and {metadata.name} has {size}; "
            + hint
        )
    pairs = zip(read_token_bytes(metadata), read_token_bytes(draft_metadata), strict=True)
    for token_id, (ours, theirs) in enumerate(pairs):
        if ours != theirs:
            raise ConfigError(
                f"token {token_id} is {theirs!r} to draft_model {draft_metadata.name} and {ours!r} to "
                f"{metadata.name}; {hint}"
            )
