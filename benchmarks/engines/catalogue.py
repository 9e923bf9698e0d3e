"""Which engines are compared, where each is installed, and what its server is started with.

Each runs with the settings that served best here among those its makers offer, on loopback, with the same
threads and room for the same number of answers. Must not know how it is measured.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from benchmarks.engines.models import BenchModel
from benchmarks.peers.catalogue import INSTALLED

NUM_THREADS = 2
MAX_RUNNING = 32
VLLM_KV_GIB = 2
VLLM_BLOCK_TOKENS = 128
"""Its CPU attention's own size."""


@dataclass(frozen=True)
class EngineRig:
    """What an engine is started with."""

    model: BenchModel
    port: int
    folder: Path
    """Its own, and gone afterwards."""
    context_tokens: int
    """Most tokens of one prompt and its answer."""
    max_running: int = MAX_RUNNING
    """Most answers computed together."""


@dataclass(frozen=True)
class PeerEngine:
    """One engine with its server."""

    name: str
    title: str
    environment: str
    """Folder under .peers."""
    package: str
    """Name of the distribution whose version the report states."""
    weights: str
    """What its matrices are kept in."""
    command: Callable[[EngineRig], list[str]]
    variables: Callable[[EngineRig], Mapping[str, str]] = field(default=lambda _: {})
    served_name: Callable[[EngineRig], str] = field(default=lambda _: "chat")
    takes_ignore_eos: bool = True
    """Else its model files name no end of text, so that answers are as long as asked."""
    says_done: bool = True
    """Its streams end with [DONE]. Else one is whole when its usage counts all tokens."""
    has_prefix_cache: bool = True
    start_limit_s: float = 60.0
    max_rounds: int = 3
    note: str = ""

    @property
    def folder(self) -> Path:
        return INSTALLED / self.environment

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    @property
    def is_installed(self) -> bool:
        return (self.folder / ".installed").exists()


def vllm_command(rig: EngineRig) -> list[str]:
    """Eager: compiled, it starts in minutes."""
    return [*vllm_compiled_command(rig), "--enforce-eager"]


def vllm_compiled_command(rig: EngineRig) -> list[str]:
    """As by default: it compiles the model at its first start and keeps that in the user's cache."""
    return [
        *(str(INSTALLED / "vllm" / "bin" / "python"), "-m", "vllm.entrypoints.cli.main", "serve"),
        str(rig.model.huggingface()),
        *("--served-model-name", "chat", "--host", "127.0.0.1", "--port", str(rig.port)),
        *("--dtype", "bfloat16", "--max-model-len", str(rig.context_tokens)),
        *("--max-num-seqs", str(rig.max_running), "--block-size", str(VLLM_BLOCK_TOKENS)),
        "--no-enable-log-requests",
    ]


def vllm_variables(rig: EngineRig) -> dict[str, str]:
    """Return both cores for its threads (by default it leaves one to its server), and what names its package:
    it looks for the distribution `vllm`, and the one for CPUs has another name."""
    named = rig.folder / "names" / "vllm-0.32.0+cpu.dist-info"
    named.mkdir(parents=True, exist_ok=True)
    (named / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n")
    return {
        "PYTHONPATH": str(named.parent),
        "OMP_NUM_THREADS": str(NUM_THREADS),
        "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
        "VLLM_CPU_KVCACHE_SPACE": str(VLLM_KV_GIB),
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }


def vllm_default_variables(rig: EngineRig) -> dict[str, str]:
    """Return the same with its own number of threads: on two cores one, the other is its server's."""
    own = ("OMP_NUM_THREADS", "VLLM_CPU_NUM_OF_RESERVED_CPU")
    return {name: value for name, value in vllm_variables(rig).items() if name not in own}


def llama_command(form: Callable[[BenchModel], Path]) -> Callable[[EngineRig], list[str]]:
    """Return how llama.cpp is started with one form of a model."""

    def command(rig: EngineRig) -> list[str]:
        return [
            *(
                str(INSTALLED / "llama-cpp" / "bin" / "python"),
                str(Path(__file__).with_name("llama_server.py")),
            ),
            *("--model", str(form(rig.model)), "--port", str(rig.port)),
            *("--threads", str(NUM_THREADS), "--slots", str(rig.max_running)),
            *("--context", str(rig.context_tokens)),
        ]

    return command


def transformers_command(rig: EngineRig) -> list[str]:
    """Continuous batching, which its server offers on CPUs, too."""
    blocks = rig.max_running * rig.context_tokens // 16
    return [
        *(str(INSTALLED / "transformers" / "bin" / "transformers"), "serve", str(_endless(rig))),
        *("--host", "127.0.0.1", "--port", str(rig.port), "--device", "cpu", "--dtype", "bfloat16"),
        *("--continuous-batching", "--no-cb-use-cuda-graph", "--cb-block-size", "16"),
        *("--cb-num-blocks", str(blocks), "--cb-max-batch-tokens", "512", "--log-level", "error"),
    ]


def transformers_variables(rig: EngineRig) -> dict[str, str]:
    return {"OMP_NUM_THREADS": str(NUM_THREADS), "HF_HUB_OFFLINE": "1"}


def _endless(rig: EngineRig) -> Path:
    """Return a directory of the model in which no token ends a text: this server knows no `ignore_eos`."""
    source, directory = rig.model.huggingface(), rig.folder / "model"
    directory.mkdir(exist_ok=True)
    for path in source.iterdir():
        copy = directory / path.name
        if path.name in ("config.json", "generation_config.json"):
            copy.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": None}))
        elif path.suffix == ".json":
            shutil.copy(path, copy)
        elif not copy.exists():
            copy.symlink_to(path)
    return directory


def engines() -> list[PeerEngine]:
    """Return the peers in the report's order."""
    return [
        PeerEngine(
            *("vllm", "vLLM 0.32, bfloat16", "vllm", "vllm-cpu", "bfloat16"),
            vllm_command,
            vllm_variables,
            start_limit_s=240.0,
            note="eager",
        ),
        PeerEngine(
            *("llama-cpp", "llama.cpp, the file as it is", "llama-cpp", "xllamacpp", "as in the file"),
            llama_command(lambda model: model.gguf()),
            note="the wheel uses AVX2, no AVX-512",
        ),
        PeerEngine(
            *("llama-cpp-q8", "llama.cpp, Q8_0", "llama-cpp", "xllamacpp", "Q8_0"),
            llama_command(lambda model: model.q8_0()),
            max_rounds=1,
            note="the same number of bits as headrace's int8",
        ),
        PeerEngine(
            *("transformers", "transformers 5.23, bfloat16", "transformers", "transformers", "bfloat16"),
            transformers_command,
            transformers_variables,
            served_name=lambda rig: str(rig.folder / "model"),
            takes_ignore_eos=False,
            says_done=False,
            has_prefix_cache=False,
            start_limit_s=90.0,
            max_rounds=1,
            note="continuous batching",
        ),
    ]


def on_request() -> list[PeerEngine]:
    """Return the variants that run only when they are named."""
    vllm = engines()[0]
    return [
        replace(
            vllm,
            name="vllm-compiled",
            title="vLLM 0.32, bfloat16, compiled",
            command=vllm_compiled_command,
            start_limit_s=600.0,
            note="compiled at its first start",
        ),
        replace(
            vllm,
            name="vllm-threads",
            title="vLLM 0.32, bfloat16, its own number of threads",
            variables=vllm_default_variables,
            note="eager; its own number of threads",
        ),
    ]
