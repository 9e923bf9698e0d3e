"""Builds a `tokenizers.Tokenizer` from what a GGUF file carries.

Owns the splitting rules by their GGUF names (`tokenizer.ggml.pre`, see llama.cpp's list of pre-tokenizers).
Must not know files or requests.
"""

from __future__ import annotations

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from headrace.engine.model_files.metadata import GgufTokenizer
from headrace.errors import ModelError

_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4
_NORMAL = 1
_SPACE_MARK = "▁"

# Split patterns as the models' own tokenizer.json files have them; {digits} is what tells them apart.
_LETTERS_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}"
    r"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLIT_PATTERNS = {
    "llama-bpe": _LETTERS_PATTERN.format(digits=r"\p{N}{1,3}"),
    "llama3": _LETTERS_PATTERN.format(digits=r"\p{N}{1,3}"),
    "qwen2": _LETTERS_PATTERN.format(digits=r"\p{N}"),
}
_PLAIN_NAMES = ("", "default", "gpt2", "gpt-2")
_SINGLE_DIGIT_NAMES = ("smollm", "starcoder", "refact", "command-r")


def build_gguf_tokenizer(source: GgufTokenizer, bos_token_id: int | None, eos_token: str) -> Tokenizer:
    """Return the tokenizer. Raises ModelError if the file's kind or splitting rule is not known."""
    if source.model == "gpt2":
        tokenizer = _build_byte_level(source)
    elif source.model == "llama":
        tokenizer = _build_sentencepiece(source)
    else:
        raise ModelError(f"the tokenizer is of kind {source.model!r}; supported are gpt2 and llama")
    _add_tokens(tokenizer, source)
    _add_surroundings(tokenizer, source, bos_token_id, eos_token)
    return tokenizer


def _build_byte_level(source: GgufTokenizer) -> Tokenizer:
    vocabulary = {token: token_id for token_id, token in enumerate(source.tokens)}
    merges = [_split_merge(merge) for merge in source.merges]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = _pre_tokenizer(source.pre_tokenizer)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _split_merge(merge: str) -> tuple[str, str]:
    # A piece may itself begin with a space's stand-in, never with a space.
    left, separator, right = merge.partition(" ")
    if not (left and separator and right):
        raise ModelError(
            f"the tokenizer has the merge {merge[:40]!r}; a merge is two pieces with a space between"
        )
    return left, right


def _pre_tokenizer(name: str) -> pre_tokenizers.PreTokenizer:
    if name in _PLAIN_NAMES:
        return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if name in _SINGLE_DIGIT_NAMES:
        return pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )
    pattern = _SPLIT_PATTERNS.get(name)
    if pattern is None:
        known = sorted({*_SPLIT_PATTERNS, *_SINGLE_DIGIT_NAMES, *_PLAIN_NAMES} - {""})
        raise ModelError(f"the tokenizer's splitting rule is {name!r}; supported are {', '.join(known)}")
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _build_sentencepiece(source: GgufTokenizer) -> Tokenizer:
    """SentencePiece BPE merges the neighbours whose union has the best score; as ranked merges, that is every
    split of every piece, best piece first."""
    vocabulary = {token: token_id for token_id, token in enumerate(source.tokens)}
    unknown = source.tokens[source.unknown_token_id] if source.unknown_token_id is not None else None
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=_merges_by_score(source, vocabulary),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    mark_spaces = normalizers.Replace(" ", _SPACE_MARK)
    prepend = [normalizers.Prepend(_SPACE_MARK)] if source.add_space_prefix else []
    tokenizer.normalizer = normalizers.Sequence([*prepend, mark_spaces])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE_MARK, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return tokenizer


def _merges_by_score(source: GgufTokenizer, vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    if len(source.scores) != len(source.tokens):
        raise ModelError(f"the tokenizer has {len(source.tokens)} tokens and {len(source.scores)} scores")
    order = sorted(range(len(source.tokens)), key=lambda token_id: -source.scores[token_id])
    merges: list[tuple[str, str]] = []
    for token_id in order:
        token = source.tokens[token_id]
        if len(token) < 2 or (source.token_types and source.token_types[token_id] != _NORMAL):
            continue
        splits = [(token[:place], token[place:]) for place in range(1, len(token))]
        known = [split for split in splits if split[0] in vocabulary and split[1] in vocabulary]
        merges += sorted(known, key=lambda split: (vocabulary[split[0]], vocabulary[split[1]]))
    return merges


def _add_tokens(tokenizer: Tokenizer, source: GgufTokenizer) -> None:
    special, plain = [], []
    for token, token_type in zip(source.tokens, source.token_types, strict=False):
        if token_type in (_UNKNOWN, _CONTROL):
            special.append(AddedToken(token, special=True, normalized=False))
        elif token_type == _USER_DEFINED:
            plain.append(AddedToken(token, special=False, normalized=False))
    tokenizer.add_tokens(plain)
    tokenizer.add_special_tokens(special)


def _add_surroundings(
    tokenizer: Tokenizer, source: GgufTokenizer, bos_token_id: int | None, eos_token: str
) -> None:
    """What encoding with special tokens puts before and after a text."""
    bos = source.tokens[bos_token_id] if source.add_bos and bos_token_id is not None else ""
    eos = eos_token if source.add_eos else ""
    used = [token for token in (bos, eos) if token]
    if not used:
        return
    single = " ".join(part for part in (bos, "$A", eos) if part)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=single,
        pair=f"{single} $B",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in used],
    )
