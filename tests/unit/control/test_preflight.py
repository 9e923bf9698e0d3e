"""What is found out before anything starts."""

from __future__ import annotations

import importlib.util
import socket
from pathlib import Path
from typing import Any

import pytest

from headrace.api.config import Config
from headrace.api.config_loader import parse_config
from headrace.control.preflight import check_address, check_keys, check_models
from headrace.errors import ConfigError


def config(bind: str = "127.0.0.1:0", **endpoints: dict[str, Any]) -> Config:
    chosen = endpoints or {"chat": {"model": "simulated", "engine": "simulated"}}
    return parse_config({"endpoints": chosen, "gateway": {"bind": bind}, "tenants": {"acme": {}}})


def test_every_model_that_cannot_be_had_is_named() -> None:
    wrong = config(a={"model": "/no/such.gguf"}, b={"model": "unknown-name"}, c={"model": "simulated"})
    with pytest.raises(ConfigError) as caught:
        check_models(wrong)
    assert [problem.split(":")[0] for problem in caught.value.problems] == [
        "endpoints.a.model",
        "endpoints.b.model",
    ]


def test_a_path_becomes_absolute_and_a_name_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "m.gguf").touch()
    monkeypatch.chdir(tmp_path)
    checked = check_models(config(a={"model": "m.gguf"}, b={"model": "simulated", "engine": "simulated"}))
    assert checked.endpoints["a"].model == str(tmp_path / "m.gguf")
    assert checked.endpoints["b"].model == "simulated"


def test_a_native_engine_without_torch_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torch" else real(name))
    with pytest.raises(ConfigError, match=r"pip install headrace\[engine\]"):
        check_models(config(a={"model": "simulated"}))
    check_models(config())


def test_adapters_must_be_there_and_their_paths_become_absolute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "poet").mkdir()
    (tmp_path / "poet" / "adapter_config.json").write_text('{"r": 4}')
    monkeypatch.chdir(tmp_path)
    wrong = config(a={"model": "simulated", "engine": "vllm", "vllm": {"lora": {"poet": "poet"}}})
    with pytest.raises(
        ConfigError, match=r"endpoints\.a\.vllm\.lora\.poet: .*adapter_model\.safetensors not found"
    ):
        check_models(wrong)


def test_vllm_must_be_installed_and_is_given_hugging_face_models_only(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "m.gguf").touch()
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "vllm" else real(name))
    with pytest.raises(ConfigError) as caught:
        check_models(config(a={"model": str(tmp_path / "m.gguf"), "engine": "vllm"}))
    missing, wrong = caught.value.problems
    assert "pip install headrace[vllm]" in missing
    assert wrong.startswith("endpoints.a.model: ")
    assert "a gguf model; engine vllm takes a Hugging Face id, or a directory" in wrong


def test_port_zero_becomes_a_free_port() -> None:
    bind = check_address(config()).gateway.bind
    assert bind.startswith("127.0.0.1:")
    assert int(bind.rpartition(":")[2]) > 0


def test_a_port_in_use_is_refused_with_a_way_out() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"127\.0\.0\.1:{port} is in use.*--set gateway\.bind="):
            check_address(config(f"127.0.0.1:{port}"))


def test_an_address_of_another_machine_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"gateway\.bind: 192\.0\.2\.1:8000 cannot be used"):
        check_address(config("192.0.2.1:8000"))


def test_the_state_directory_becomes_absolute_and_its_keys_must_be_usable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    directory = tmp_path / "headrace"
    assert check_keys(config()).state_dir == str(directory)
    assert not directory.exists(), "looking creates nothing"
    directory.mkdir(0o700)
    (directory / "keys.json").write_text("{")
    (directory / "keys.json").chmod(0o600)
    with pytest.raises(ConfigError, match=r"keys\.json: is damaged"):
        check_keys(config())
    assert check_keys(config().model_copy(update={"tenants": {}})), "without tenants nobody needs keys"
