"""The peer: Hugging Face transformers with the same weights, in a process of its own.

Reads one batch size per line and answers each with one line of JSON. Static batches are the peer's best case:
all prompts are equally long, begin together, and end together.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
import warnings
from typing import Any

NUM_THREADS = 2
NUM_INPUT = 128
NUM_OUTPUT = 128


def main() -> int:
    # stdout belongs to the answers; whatever a library prints goes to stderr.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    started_s = time.monotonic()
    torch, model = load_model()
    print(json.dumps({"load_s": time.monotonic() - started_s}), file=answers)
    measure(torch, model, 1, 4)  # first calls allocate and choose kernels
    for line in sys.stdin:
        print(json.dumps(measure(torch, model, int(line), NUM_OUTPUT)), file=answers)
    return 0


def load_model() -> tuple[Any, Any]:
    """Return torch and transformers' Llama in bfloat16, with the weights that headrace's reader takes out of
    the same file (transformers' own GGUF loading needs one package more)."""
    warnings.simplefilter("ignore")
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from benchmarks.system import MODEL
    from headrace.engine.model_files.metadata import read_metadata
    from headrace.engine.model_files.resolve import resolve_model
    from headrace.engine.weights.names import expected_shapes, huggingface_name
    from headrace.engine.weights.source import open_weights

    torch.set_num_threads(NUM_THREADS)
    files = resolve_model(MODEL)
    metadata = read_metadata(files)
    h = metadata.hyperparameters
    config = LlamaConfig(
        vocab_size=h.vocab_size,
        hidden_size=h.hidden_size,
        intermediate_size=h.intermediate_size,
        num_hidden_layers=h.num_layers,
        num_attention_heads=h.num_heads,
        num_key_value_heads=h.num_kv_heads,
        head_dim=h.head_dim,
        rms_norm_eps=h.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": h.rope_theta},
        max_position_embeddings=h.context_length,
        tie_word_embeddings=h.is_tied,
        bos_token_id=metadata.bos_token_id,
        eos_token_id=sorted(metadata.eos_token_ids),
    )
    model: Any = LlamaForCausalLM(config)
    model = model.to(torch.bfloat16)
    source = open_weights(files, h)
    state = {
        huggingface_name(name, has_post_norms=False): source.read(name, torch.bfloat16)
        for name in expected_shapes(h)
    }
    found = model.load_state_dict(state, strict=False)
    assert not found.unexpected_keys, found.unexpected_keys
    assert set(found.missing_keys) <= {"lm_head.weight"}, found.missing_keys
    model.tie_weights()
    model.train(False)
    return torch, model


def measure(torch: Any, model: Any, batch: int, num_output: int) -> dict[str, float]:
    """Generate greedily; return the times to the first token and to the last."""
    source = random.Random(batch)
    vocabulary = model.config.vocab_size
    prompts = torch.tensor(
        [[source.randrange(100, vocabulary) for _ in range(NUM_INPUT)] for _ in range(batch)]
    )
    times = {}
    for name, count in (("first_s", 1), ("total_s", num_output)):
        started_s = time.monotonic()
        with torch.inference_mode():
            found = model.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                do_sample=False,
                min_new_tokens=count,
                max_new_tokens=count,
                pad_token_id=0,
            )
        times[name] = time.monotonic() - started_s
        assert found.shape == (batch, NUM_INPUT + count), found.shape
    return {"batch": batch, "num_output": num_output, **times}


if __name__ == "__main__":
    raise SystemExit(main())
