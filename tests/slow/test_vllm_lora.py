"""LoRA adapters in a real vLLM: served under their names beside their model, loaded before anyone asks."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from tests.integration.front_process import RunningFront, running_front
from tests.slow.vllm_rig import START_LIMIT_S, is_gone, processes_below, spec_of, start_engine, write_model

from headrace.api.messages import EngineFailed, EngineSpec

pytest.importorskip("vllm", reason="needs the environment of `make test-slow`, which holds vLLM")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
RANK = 4
SEEN_CHARACTERS = 8
PROMPT = "The capital of France is"


def write_adapter(directory: Path, model: Path, seed: int, *, num_layers: int = 0) -> str:
    """Write an adapter as PEFT does, with random weights that are large enough to change every answer."""
    import torch
    from safetensors.torch import save_file

    config = json.loads((model / "config.json").read_text())
    size = config["hidden_size"]
    random = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(num_layers or config["num_hidden_layers"]):
        name = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        tensors[f"{name}.lora_A.weight"] = 0.3 * torch.randn(RANK, size, generator=random)
        tensors[f"{name}.lora_B.weight"] = 0.3 * torch.randn(size, RANK, generator=random)
    directory.mkdir()
    save_file(tensors, directory / "adapter_model.safetensors")
    described = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": 8,
        "target_modules": ["q_proj"],
        "bias": "none",
    }
    (directory / "adapter_config.json").write_text(json.dumps(described))
    return str(directory)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "smollm2")


@pytest.fixture(scope="module")
def front(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningFront]:
    directory = tmp_path_factory.mktemp("adapters")
    adapters = {
        name: write_adapter(directory / name, model, seed) for seed, name in enumerate(("poet", "law"))
    }
    spec = msgspec.structs.replace(spec_of(model), lora=adapters)
    with running_front(spec, resume_limit_s=START_LIMIT_S) as running:  # an engine starts for long on CPUs
        running.router.wait_for(lambda report: report.state == "ready", START_LIMIT_S)
        yield running


def ask(front: RunningFront, model: str, **fields: Any) -> httpx.Response:
    body = {"model": model, "prompt": PROMPT, "max_tokens": 12, "temperature": 0, **fields}
    return httpx.post(f"{front.url}/v1/completions", json=body, timeout=120)


def text_of(front: RunningFront, model: str) -> str:
    answer = ask(front, model)
    assert answer.status_code == 200, answer.text
    assert answer.json()["model"] == model
    return str(answer.json()["choices"][0]["text"])


def test_each_name_answers_with_its_own_weights_and_shares_no_cached_prefix(front: RunningFront) -> None:
    plain = text_of(front, "chat")
    assert "Paris" in plain
    texts = {name: text_of(front, name) for name in ("poet", "law")}
    assert len({plain, *texts.values()}) == 3, texts
    assert text_of(front, "chat") == plain
    assert {name: text_of(front, name) for name in texts} == texts
    long = "Once upon a time " * 60
    answers = {name: ask(front, name, prompt=long).json() for name in ("chat", "poet", "law", "chat")}
    again = ask(front, "poet", prompt=long).json()
    cached = {
        name: answer["usage"]["prompt_tokens_details"]["cached_tokens"] for name, answer in answers.items()
    }
    assert (cached["poet"], cached["law"]) == (0, 0)
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] > 0


def test_what_is_served_is_listed_and_what_is_not_is_not_found(front: RunningFront) -> None:
    listed = httpx.get(f"{front.url}/v1/models").json()["data"]
    assert [card["id"] for card in listed] == ["chat", "poet", "law"]
    assert httpx.get(f"{front.url}/v1/models/law").json()["id"] == "law"
    missing = ask(front, "painter")
    assert missing.status_code == 404
    assert "this replica serves 'chat', 'poet', 'law'" in missing.text


def stream(front: RunningFront, on_text: Callable[[str], None]) -> str:
    body = {"model": "poet", "prompt": PROMPT, "max_tokens": 200, "temperature": 0, "ignore_eos": True}
    text, url = "", f"{front.url}/v1/completions"
    with httpx.stream("POST", url, json={**body, "stream": True}, timeout=START_LIMIT_S) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                event = json.loads(line.removeprefix("data: "))
                assert "error" not in event, event
                text += event["choices"][0]["text"]
                on_text(text)
    return text


def test_a_stream_goes_on_with_its_adapter_after_the_engine_core_was_killed(front: RunningFront) -> None:
    undisturbed = stream(front, lambda text: None)
    below = processes_below(front.router.latest.engine_pid)
    (core,) = [process for process in below if "EngineCore" in process.name() + " ".join(process.cmdline())]
    killed_at: list[int] = []

    def kill_once(text: str) -> None:
        if not killed_at and len(text) > 40:
            killed_at.append(len(text))
            core.kill()

    text = stream(front, kill_once)
    assert killed_at
    assert is_gone(core)
    # Random weights are chaotic, and bfloat16 rounds a prompt differently: soon another token may win. What
    # follows the cut is the adapter's, and nothing that the model alone would say.
    cut, seen = killed_at[0], killed_at[0] + SEEN_CHARACTERS
    assert text[:seen] == undisturbed[:seen], f"cut after {cut} characters"
    plain = ask(front, "chat", prompt=PROMPT + undisturbed[:cut]).json()["choices"][0]["text"]
    assert not plain.startswith(undisturbed[cut:seen])


def test_an_adapter_that_is_none_ends_the_start_and_says_which(model: Path, tmp_path: Path) -> None:
    def failure_of(spec: EngineSpec) -> EngineFailed:
        with start_engine(spec) as engine:
            event = engine.until(lambda event: isinstance(event, EngineFailed))
            assert isinstance(event, EngineFailed)
        return event

    failed = failure_of(msgspec.structs.replace(spec_of(model), lora={"poet": str(tmp_path)}))
    assert not failed.retryable
    assert "vllm.lora.poet" in failed.error
    broken = Path(write_adapter(tmp_path / "broken", model, 1))
    (broken / "adapter_model.safetensors").write_bytes(b"no tensors")
    failed = failure_of(msgspec.structs.replace(spec_of(model), lora={"poet": str(broken)}))
    assert not failed.retryable
    assert "cannot use the LoRA adapter 'poet'" in failed.error
