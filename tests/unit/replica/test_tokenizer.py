"""Tokenizers built from GGUF metadata agree with a naive one, and their byte tables with their decoders."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import regex
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from headrace.api.messages import EngineSpec
from headrace.engine.model_files.metadata import GgufTokenizer, ModelMetadata, read_metadata
from headrace.engine.model_files.resolve import resolve_model
from headrace.engine.model_files.vocabulary import read_token_bytes
from headrace.errors import InvalidRequest, ModelError
from headrace.replica.gguf_tokenizer import build_gguf_tokenizer
from headrace.replica.text import TextDecoder, TokenBytes
from headrace.replica.text_model import PromptEncoder, TextModel, load_text_model
from headrace.replica.tokenizer import ByteTokenizer, ModelTokenizer, load_tokenizer_json

SMOLLM2 = "smollm2-135m-instruct"
TEXTS = [
    "What is the capital of Italy?",
    "  leading and trailing  ",
    "1234567890 and 3.14159, 1e-9",
    "def f(x):\n\treturn x ** 2  # squared\n\n\n",
    "naïve café — “quotes” … ½ №",
    "日本語のテキスト 한국어 русский العربية हिन्दी",
    "😀👩‍👩‍👧‍👦🏳️‍🌈 emoji",
    "don't we'll they're I'm CAN'T",
    "<|im_start|>user\nhello<|im_end|>\n",
    "\x00\x01\x7f\u200b\ufeff\u2028",
    "a" * 300 + " " * 50 + "\n" * 10,
]


@pytest.fixture(scope="module")
def metadata() -> ModelMetadata:
    return read_metadata(resolve_model(SMOLLM2))


@pytest.fixture(scope="module")
def model() -> TextModel:
    return load_text_model(EngineSpec("native", SMOLLM2))


# GPT-2's splitting pattern, as its own encoder has it; SmolLM2 also takes every digit alone.
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


class NaiveSmolLM2:
    """Byte-level BPE as its definition reads, one merge at a time: the oracle."""

    def __init__(self, source: GgufTokenizer) -> None:
        self._ids = {token: token_id for token_id, token in enumerate(source.tokens)}
        self._ranks = {tuple(merge.split(" ")): rank for rank, merge in enumerate(source.merges)}
        printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
        others = [byte for byte in range(256) if byte not in printable]
        self._stand_in = {byte: chr(byte) for byte in printable}
        self._stand_in |= {byte: chr(256 + place) for place, byte in enumerate(others)}

    def encode(self, text: str) -> list[int]:
        token_ids: list[int] = []
        for run in regex.findall(r"\p{N}|\P{N}+", text):
            for word in regex.findall(GPT2_PATTERN, run):
                token_ids += self._merge([self._stand_in[byte] for byte in word.encode()])
        return token_ids

    def _merge(self, parts: list[str]) -> list[int]:
        while len(parts) > 1:
            ranked = [(self._ranks.get(pair, 1 << 30), k) for k, pair in enumerate(pairwise(parts))]
            rank, place = min(ranked)
            if rank == 1 << 30:
                break
            parts[place : place + 2] = [parts[place] + parts[place + 1]]
        return [self._ids[part] for part in parts if part in self._ids]


@pytest.mark.slow
def test_smollm2_tokenizes_as_the_naive_encoder_does(model: TextModel, metadata: ModelMetadata) -> None:
    assert metadata.gguf_tokenizer is not None
    naive = NaiveSmolLM2(metadata.gguf_tokenizer)
    for text in TEXTS:
        if "<|im_" not in text:
            assert model.tokenizer.encode(text, add_special_tokens=False) == naive.encode(text), text


def test_special_tokens_in_a_chat_are_one_id_each(model: TextModel) -> None:
    assert model.chat_template is not None
    text = model.chat_template.render([{"role": "user", "content": "Hi"}])
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    token_ids = model.tokenizer.encode(text, add_special_tokens=False)
    assert token_ids.count(1) == text.count("<|im_start|>") >= 2
    assert token_ids.count(2) == text.count("<|im_end|>") >= 1
    assert model.tokenizer.decode(token_ids) == text


@pytest.mark.slow
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
def test_smollm2_streams_what_its_decoder_gives_at_once(model: TextModel, text: str) -> None:
    tokenizer = model.tokenizer
    decoder = TextDecoder(tokenizer.token_bytes)
    token_ids = tokenizer.encode(text, add_special_tokens=False)
    assume(all(tokenizer.token_bytes[token_id] for token_id in token_ids))  # special tokens: the next test
    streamed = "".join(decoder.feed([token_id]) for token_id in token_ids) + decoder.finish()
    # Its vocabulary lacks a few bytes that no common text has, so not every text comes back.
    assert streamed == tokenizer.decode(token_ids)
    if text.isprintable() and max(map(ord, text), default=0) < 0x250:
        assert streamed == text


def test_special_tokens_are_not_shown_in_streams(model: TextModel) -> None:
    assert model.tokenizer.token_bytes[2] == b""
    assert model.tokenizer.decode([2]) == "<|im_end|>"


def test_ids_beyond_the_vocabulary_are_empty(model: TextModel) -> None:
    assert model.tokenizer.token_bytes[49_152 + 5] == b""


def sentencepiece(**changes: Any) -> GgufTokenizer:
    tokens = ["<unk>", "<s>", "</s>", *[f"<0x{byte:02X}>" for byte in range(256)]]
    types = [2, 3, 3, *[6] * 256]
    scores = [0.0] * len(tokens)
    for place, piece in enumerate(["▁", "a", "b", "c", "ab", "▁a", "▁ab", "bc", "abc", "<tag>"]):
        tokens.append(piece)
        types.append(4 if piece == "<tag>" else 1)
        scores.append(-float(place))
    fields: dict[str, Any] = {
        "model": "llama",
        "pre_tokenizer": "",
        "tokens": tokens,
        "token_types": types,
        "merges": [],
        "scores": scores,
        "add_bos": True,
        "add_eos": False,
        "add_space_prefix": True,
        "unknown_token_id": 0,
    }
    return GgufTokenizer(**{**fields, **changes})


def pieces(source: GgufTokenizer, text: str) -> list[str]:
    tokenizer = ModelTokenizer(build_gguf_tokenizer(source, 1, "</s>"))
    return [source.tokens[token_id] for token_id in tokenizer.encode(text, add_special_tokens=True)]


def test_sentencepiece_merges_the_best_score_first() -> None:
    # "▁" + "a" scores -5, "a" + "b" -4: the better one goes first, then "▁ab".
    assert pieces(sentencepiece(), "ab") == ["<s>", "▁ab"]
    assert pieces(sentencepiece(), "abc") == ["<s>", "▁ab", "c"]
    assert pieces(sentencepiece(add_space_prefix=False, add_bos=False), "abc") == ["abc"]


def test_sentencepiece_falls_back_to_bytes_and_streams_them_back() -> None:
    source = sentencepiece(add_space_prefix=False)
    assert pieces(source, "é") == ["<s>", "<0xC3>", "<0xA9>"]
    tokenizer = ModelTokenizer(build_gguf_tokenizer(source, 1, "</s>"))
    text = "ab é a<tag>b 😀"
    decoder = TextDecoder(tokenizer.token_bytes)
    token_ids = tokenizer.encode(text, add_special_tokens=True)
    assert "".join(decoder.feed([i]) for i in token_ids) + decoder.finish() == text


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": "t5"}, "supported are gpt2 and llama"),
        ({"model": "gpt2", "pre_tokenizer": "odd"}, "splitting rule is 'odd'"),
        ({"model": "gpt2", "merges": ["onepiece"]}, "two pieces"),
        ({"scores": []}, "0 scores"),
    ],
)
def test_what_cannot_be_built_is_said(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ModelError, match=words):
        build_gguf_tokenizer(sentencepiece(**changes), 1, "</s>")


@pytest.mark.parametrize("name", ["qwen2", "llama-bpe", "smollm", "gpt2", "default"])
def test_every_splitting_rule_keeps_the_text(name: str, metadata: ModelMetadata) -> None:
    source = metadata.gguf_tokenizer
    assert source is not None
    changed = GgufTokenizer(
        **{f: getattr(source, f) for f in source.__slots__ if f != "pre_tokenizer"}, pre_tokenizer=name
    )
    tokenizer = ModelTokenizer(build_gguf_tokenizer(changed, None, ""))
    for text in TEXTS[:8]:
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_a_tokenizer_json_round_trips(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "Ġ": 2, "ab": 3}, merges=[("a", "b")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    path = tmp_path / "tokenizer.json"
    tokenizer.save(str(path))
    loaded = ModelTokenizer(load_tokenizer_json(path))
    assert loaded.encode("ab a", add_special_tokens=True) == [3, 2, 0]
    assert b"".join(loaded.token_bytes[i] for i in (3, 2, 0)) == b"ab a"


def test_a_damaged_tokenizer_json_and_an_unknown_decoder_are_model_errors(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text('{"version": 1}')
    with pytest.raises(ModelError, match=r"tokenizer\.json: not a tokenizer"):
        load_tokenizer_json(path)
    with pytest.raises(ModelError, match="decoder is none"):
        ModelTokenizer(Tokenizer(models.BPE()))


def test_the_engine_reads_the_same_bytes_without_a_tokenizer(
    model: TextModel, metadata: ModelMetadata, tmp_path: Path
) -> None:
    token_bytes = read_token_bytes(metadata)
    assert len(token_bytes) == metadata.hyperparameters.vocab_size
    assert token_bytes == [model.tokenizer.token_bytes[token_id] for token_id in range(len(token_bytes))]

    # More logits than tokens, as embeddings are rounded up.
    source = sentencepiece()
    num_tokens = len(source.tokens) + 5
    shape = replace(metadata.hyperparameters, vocab_size=num_tokens)
    tokenizer = build_gguf_tokenizer(source, 1, "</s>")
    by_library = ModelTokenizer(tokenizer).token_bytes
    wanted = [by_library[token_id] for token_id in range(num_tokens)]
    assert wanted[-6:] == [b"<tag>", b"", b"", b"", b"", b""]
    assert read_token_bytes(replace(metadata, gguf_tokenizer=source, hyperparameters=shape)) == wanted
    path = tmp_path / "tokenizer.json"
    tokenizer.save(str(path))
    from_json = replace(metadata, gguf_tokenizer=None, tokenizer_json=path, hyperparameters=shape)
    assert read_token_bytes(from_json) == wanted
    path.write_text('{"model": {"vocab": []}}')
    with pytest.raises(ModelError, match="vocabulary cannot be read"):
        read_token_bytes(from_json)


@pytest.mark.parametrize("is_simulated", [True, False])
def test_half_a_surrogate_pair_is_the_clients_mistake(is_simulated: bool, model: TextModel) -> None:
    tokenizer = ByteTokenizer() if is_simulated else model.tokenizer
    with pytest.raises(InvalidRequest, match="surrogate"):
        tokenizer.encode("a\ud800", add_special_tokens=False)


class SlowTokenizer:
    """Says in which thread it was asked."""

    def __init__(self) -> None:
        self.token_bytes: TokenBytes = {}
        self.threads: list[str] = []

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        self.threads.append(threading.current_thread().name)
        return [len(text)]

    def decode(self, token_ids: Sequence[int]) -> str:
        return ""


@pytest.mark.parametrize(
    ("num_characters", "num_in_all", "is_in_thread"),
    [(10, 0, False), (100_000, 0, True), (10, 100_000, True)],
)
async def test_long_prompts_are_tokenized_beside_the_streams(
    num_characters: int, num_in_all: int, is_in_thread: bool
) -> None:
    tokenizer = SlowTokenizer()
    encoder = PromptEncoder(tokenizer)
    try:
        token_ids = await encoder.encode(
            "x" * num_characters, add_special_tokens=True, num_characters_in_all=num_in_all
        )
    finally:
        encoder.close()
    assert token_ids == [num_characters]
    assert tokenizer.threads[0].startswith("tokenize") == is_in_thread
