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
    """Return torch and the model in bfloat16."""
    warnings.simplefilter("ignore")
    import torch
    from transformers import AutoModelForCausalLM

    from benchmarks.system import MODEL
    from headrace.engine.model_files.resolve import resolve_model

    torch.set_num_threads(NUM_THREADS)
    path = resolve_model(MODEL).path
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.bfloat16)
    return torch, model.eval()


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
