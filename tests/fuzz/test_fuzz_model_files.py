"""Readers of model files under bytes that nobody writes: metadata or a ModelError, soon, in little memory."""

from __future__ import annotations

import json
import math
import struct
import tracemalloc
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st
from tests.fuzz.fuzzing import fuzz, mutations
from tests.unit.engine.test_model_files_gguf_header import array, header, tensor, text
from tests.unit.engine.test_model_files_metadata import huggingface

from headrace.engine.model_files.gguf_header import read_gguf_header
from headrace.engine.model_files.metadata import read_metadata
from headrace.engine.model_files.resolve import ModelFiles
from headrace.engine.model_files.safetensors_header import read_safetensors_header
from headrace.engine.weights.packed_file import PackedFileError, map_packed
from headrace.errors import ModelError

pytestmark = pytest.mark.slow
MOST_BYTES = 24 << 20
NUMBERS = st.one_of(
    st.integers(0, 9), st.sampled_from([2**31, 2**32, 2**60, 2**63, 2**64 - 1]), st.integers(0, 2**64 - 1)
)
KEYS = st.sampled_from(["general.architecture", "llama.block_count", "general.alignment", "k"])
VALUES = st.one_of(
    st.builds(lambda key, number: text(key) + struct.pack("<IQ", 10, number), KEYS, NUMBERS),
    st.builds(lambda key, value: text(key) + struct.pack("<I", 8) + text(value), KEYS, st.text(max_size=5)),
    st.builds(array, KEYS, st.integers(0, 12), NUMBERS, st.binary(max_size=40)),
)
TENSORS = st.builds(
    tensor,
    st.sampled_from(["token_embd.weight", "a", ""]),
    st.lists(NUMBERS, max_size=5),
    st.integers(0, 31),
    NUMBERS,
)
GGUF = st.builds(
    lambda values, tensors, rest: header(
        len(tensors), len(values), b"".join(values) + b"".join(tensors) + rest
    ),
    st.lists(VALUES, max_size=4),
    st.lists(TENSORS, max_size=4),
    st.binary(max_size=200),
)
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.floats()
    | st.integers(-(10**400), 10**400)
    | st.text(max_size=5)
    | NUMBERS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=8,
)
ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "U8", "F4"]) | JSON,
        "shape": st.lists(NUMBERS, max_size=4) | JSON,
        "data_offsets": st.tuples(NUMBERS, NUMBERS) | JSON,
    }
)
SAFETENSORS = st.builds(
    lambda entries, rest: struct.pack("<Q", len(json.dumps(entries))) + json.dumps(entries).encode() + rest,
    st.dictionaries(st.sampled_from(["a", "b", "__metadata__"]), ENTRIES | JSON, max_size=3),
    st.binary(max_size=100),
)


def within_memory(call: Any) -> None:
    message = ""
    tracemalloc.start()
    try:
        call()
    except (ModelError, PackedFileError) as error:
        message = str(error)
    finally:
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert most < MOST_BYTES
    assert len(message) < 2000


def test_any_gguf_header_is_read_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"

    def target(data: bytes) -> None:
        path.write_bytes(data)
        within_memory(lambda: read_gguf_header(path))
        within_memory(lambda: read_metadata(ModelFiles("m", "gguf", path)))
        with suppress(ModelError):
            tensors = read_gguf_header(path).tensors.values()
            assert sum(tensor.size_bytes for tensor in tensors) <= len(data), "no byte is claimed twice"

    fuzz(target, GGUF | mutations(GGUF))


def test_any_safetensors_header_is_read_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"

    def target(data: bytes) -> None:
        path.write_bytes(data)
        within_memory(lambda: read_safetensors_header(path))
        with suppress(ModelError):
            tensors = read_safetensors_header(path).values()
            assert sum(tensor.size_bytes for tensor in tensors) <= len(data), "no byte is claimed twice"
            assert all(math.prod(tensor.shape) <= tensor.size_bytes for tensor in tensors)

    fuzz(target, SAFETENSORS | mutations(SAFETENSORS))


def test_any_config_of_a_directory_is_read_or_refused(tmp_path: Path) -> None:
    huggingface(tmp_path)
    good = json.loads((tmp_path / "config.json").read_bytes())
    keys = [
        *good,
        "rope_scaling",
        "rope_parameters",
        "sliding_window",
        "layer_types",
        "head_dim",
        "rope_theta",
    ]
    keys += ["chat_template", "eos_token_id", "temperature", "bos_token", "top_k"]

    def target(changes: dict[str, Any], file: str, raw: bytes) -> None:
        content = json.dumps({**good, **changes}).encode() if raw == b"" else raw
        (tmp_path / file).write_bytes(content)
        within_memory(lambda: read_metadata(ModelFiles("m", "huggingface", tmp_path)))
        (tmp_path / "config.json").write_text(json.dumps(good))

    changes = st.dictionaries(st.sampled_from(keys), JSON, max_size=3)
    files = st.sampled_from(["config.json", "generation_config.json", "tokenizer_config.json"])
    fuzz(target, changes, files, st.just(b"") | st.binary(max_size=40))


def test_any_packed_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.packed"

    def target(data: bytes) -> None:
        path.write_bytes(data)
        path.chmod(0o600)
        within_memory(lambda: map_packed(path, {"files": []}))

    heads = st.builds(
        lambda size, rest: b"hrpack\x01\x00" + struct.pack("<Q", size) + rest, NUMBERS, st.binary()
    )
    fuzz(target, heads | mutations(heads))
