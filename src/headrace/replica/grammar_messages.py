"""What a front and its grammar worker say to each other."""

from __future__ import annotations

from typing import Literal

import msgspec

FormKind = Literal["json", "regex", "choice", "grammar"]


class GrammarTask(msgspec.Struct, frozen=True):
    """To the worker. json: `text` is a schema; choice: a list of texts (both as JSON); regex: a pattern;
    grammar: a grammar in Lark's or GBNF's notation."""

    kind: FormKind
    text: str


class GrammarVerdict(msgspec.Struct, frozen=True):
    """From the worker: the grammar for `GenerationRequest.grammar`, or what is wrong."""

    grammar: str = ""
    error: str = ""
