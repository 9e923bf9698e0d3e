"""The front's text side of models whose architecture is another engine's business."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from headrace.api.messages import EngineSpec
from headrace.errors import ModelError
from headrace.replica.text_model import load_text_model


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A model that the native engine does not know, with a tokenizer of single bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({piece: index for index, piece in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["NewForCausalLM"]}))
    template = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    settings = {"bos_token": "<s>", "chat_template": template}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    return tmp_path


def test_a_model_that_only_vllm_knows_has_tokenizer_and_template(directory: Path) -> None:
    model = load_text_model(EngineSpec("vllm", str(directory)))
    ids = model.tokenizer.encode("héllo", add_special_tokens=False)
    assert model.tokenizer.decode(ids) == "héllo"
    assert model.chat_template is not None
    assert model.chat_template.render([{"role": "user", "content": "hi"}]) == "<s>hi"
    with pytest.raises(ModelError, match="'NewForCausalLM' is not supported"):
        load_text_model(EngineSpec("native", str(directory)))


def test_a_directory_without_a_tokenizer_is_refused(directory: Path) -> None:
    (directory / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"has no tokenizer\.json"):
        load_text_model(EngineSpec("vllm", str(directory)))
