"""What decides tokens is in the class, and nothing else."""

from __future__ import annotations

import msgspec

from headrace.api.messages import EngineReady
from headrace.replica.stream_class import stream_class_of

INFO = EngineReady(
    "native", "llama", 49152, 2048, 16, 100, 32, "int8 avx512, 2 threads; speculation: ngram", {"x": 1.0}
)


def test_threads_speculation_memory_and_batch_decide_no_token() -> None:
    known = stream_class_of("m", INFO)
    for path in ("int8 avx512, 1 thread", "int8 avx512, 8 threads; speculation: off", "int8 avx512"):
        assert stream_class_of("m", msgspec.structs.replace(INFO, path=path)) == known
    assert stream_class_of("m", msgspec.structs.replace(INFO, num_total_blocks=5, max_running=1)) == known


def test_arithmetic_model_vocabulary_and_the_longest_context_do() -> None:
    classes = {stream_class_of("m", INFO), stream_class_of("other", INFO)}
    for change in (
        {"path": "bfloat16 mkldnn, 2 threads; speculation: ngram"},
        {"path": "int8 avx2, 2 threads"},
        {"architecture": "gemma3"},
        {"vocab_size": 49153},
        {"max_context_tokens": 1024},
        {"block_size": 32},
        {"kind": "simulated"},
    ):
        classes.add(stream_class_of("m", msgspec.structs.replace(INFO, **change)))
    assert len(classes) == 9
