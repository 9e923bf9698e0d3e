"""The command line: mistakes are told in a sentence with an exit status, never with a traceback."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import headrace
from headrace.cli import main as main_module
from headrace.cli.main import COMMANDS, main

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Run `headrace ARGUMENTS` in this process: exit status, stdout, stderr."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "200")

    def run_command(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["headrace", *arguments])
        status = 0
        try:
            main()
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return status, captured.out, captured.err

    return run_command


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "config.yaml"
    path.write_text("endpoints: {chat: {model: simulated, engine: simulated, replicas: {min: 1, max: 3}}}")
    return str(path)


def test_the_version_is_told_both_ways(run: Run) -> None:
    assert run("version") == (0, f"headrace {headrace.__version__}\n", "")
    assert run("--version") == (0, f"headrace {headrace.__version__}\n", "")


def test_the_help_names_every_command(run: Run) -> None:
    status, out, _ = run("--help")
    assert status == 0
    for command in COMMANDS:
        assert f"  {command} " in out


@pytest.mark.parametrize("command", [name for name in COMMANDS if name not in ("chat", "bench")])
def test_every_command_has_help(run: Run, command: str) -> None:
    status, out, _ = run(command, "--help")
    assert status == 0
    assert "Usage" in out


def test_an_unknown_command_or_option_is_a_mistake(run: Run) -> None:
    for arguments in (("serve",), ("up", "--fast"), ("scale", "chat", "many"), ("scale", "chat", "-1")):
        status, _, err = run(*arguments)
        assert status == 2
        assert err


def test_config_check_says_what_would_be_served(run: Run, config: str) -> None:
    status, out, _ = run("config", "check", config)
    assert status == 0
    assert "chat: simulated on the simulated engine, 1 to 3 replicas" in out
    assert "ok" in out


def test_config_check_lists_every_mistake(run: Run, config: str) -> None:
    status, _, err = run(
        "config", "check", config, "--set", "endpoints.chat.engin=x", "--set", "gateway.bind=x"
    )
    assert status == 2
    assert err.count("error: ") == 2
    assert "Did you mean 'engine'?" in err


def test_config_check_names_a_missing_model_file(run: Run, config: str) -> None:
    status, _, err = run("config", "check", config, "--set", "endpoints.chat.model=/no/such.gguf")
    assert status == 2
    assert "endpoints.chat.model: /no/such.gguf: no such file" in err


def test_config_show_prints_every_default_and_follows_the_environment(
    run: Run, config: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HEADRACE__GATEWAY__BIND", "127.0.0.1:9999")
    status, out, _ = run("config", "show", config)
    assert status == 0
    assert "bind: 127.0.0.1:9999" in out
    assert "max_wait_s: 60.0" in out


@pytest.mark.parametrize("command", [("up",), ("config", "check"), ("config", "show"), ("apply",)])
def test_without_a_config_the_way_out_is_told(run: Run, command: tuple[str, ...]) -> None:
    status, _, err = run(*command)
    assert status == 2
    assert "examples/quickstart.yaml" in err


def test_commands_to_a_system_that_is_not_running_say_so(run: Run, config: str) -> None:
    for arguments in (
        ("status",),
        ("status", "--json"),
        ("status", "--watch"),
        ("scale", "chat", "2"),
        ("apply", config),
    ):
        status, out, err = run(*arguments)
        assert status == 1
        assert out == ""
        assert "no system called 'default' is running" in err


def test_a_bad_name_is_a_mistake(run: Run) -> None:
    status, _, err = run("status", "--name", "a/b")
    assert status == 1
    assert "letters" in err


def test_only_a_cluster_can_be_left_running(run: Run, config: str) -> None:
    status, _, err = run("up", config, "--detach")
    assert status == 2
    assert "--detach needs launcher ray" in err


def test_a_cluster_needs_a_port_that_is_known_beforehand(run: Run, config: str) -> None:
    status, _, err = run("up", config, "--launcher", "ray", "--set", "gateway.bind=127.0.0.1:0")
    assert status == 2
    assert "with launcher ray choose a port" in err


def test_a_cluster_that_is_not_there_is_told(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    for command in ("down", "status"):
        status, _, err = run(command)
        assert status == 1
        assert "127.0.0.1:1 cannot be reached" in err


def test_another_version_of_ray_is_refused(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2.59.1")
    status, _, err = run("down")
    assert status == 1
    assert "ray 2.59.1 is installed, and headrace is made for 2.60" in err


def test_watch_and_json_exclude_each_other(run: Run) -> None:
    status, _, err = run("status", "--watch", "--json")
    assert status == 2
    assert "give one of them" in err


def test_a_bug_of_ours_keeps_its_traceback(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def explode() -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(main_module, "app", explode)
    with pytest.raises(ZeroDivisionError):
        run("version")


@pytest.mark.slow
def test_the_command_line_imports_little() -> None:
    """What makes `headrace --help` fast: no model library, no server, no tables before they are needed."""
    code = (
        "import sys, headrace.cli.main;"
        "print([name for name in ('torch', 'numpy', 'rich.table', 'pydantic', 'httpx', 'asyncio', 'openai')"
        " if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.fixture
def tenants(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    path = tmp_path / "tenants.yaml"
    path.write_text("{endpoints: {chat: {model: m}}, tenants: {acme: {}, small: {}}}")
    return str(path)


def test_keys_are_made_listed_and_revoked_without_a_running_system(run: Run, tenants: str) -> None:
    status, key, words = run("keys", "create", "acme", "--name", "laptop", "--config", tenants)
    assert status == 0
    assert len(key.strip()) == len("hr-") + 43
    assert key.strip() not in words
    key_id = words.split()[0]
    status, table, _ = run("keys", "list", "--config", tenants)
    assert status == 0
    assert [line.split()[:3] for line in table.splitlines()] == [
        ["id", "tenant", "name"],
        [key_id, "acme", "laptop"],
    ]
    assert run("keys", "list", "small", "--config", tenants)[1].count("\n") == 1
    status, out, words = run("keys", "revoke", key_id, "--config", tenants)
    assert (status, out) == (0, "")
    assert "its open streams go on" in words
    status, _, words = run("keys", "revoke", key_id, "--config", tenants)
    assert (status, "no key with the id" in words) == (2, True)


def test_a_key_for_nobody_names_the_tenants_and_without_a_config_a_warning_is_told(
    run: Run, tenants: str
) -> None:
    status, out, words = run("keys", "create", "nobody", "--config", tenants)
    assert (status, out) == (2, "")
    assert "there are: acme, small" in words
    status, out, words = run("keys", "create", "nobody")
    assert (status, out.startswith("hr-")) == (0, True)
    assert "without knowing the tenants" in words
    status, out, words = run("keys", "list", "--config", tenants)
    assert "has no tenant nobody" in words


def test_the_admin_keys_file_is_named_and_made(run: Run, tenants: str) -> None:
    status, path, words = run("keys", "admin", "--config", tenants)
    assert status == 0
    first = Path(path.strip()).read_text()
    assert first.strip() not in path + words
    assert "gateway.admin_bind" in words
    run("keys", "admin", "--config", tenants)
    assert Path(path.strip()).read_text() == first
    run("keys", "admin", "--rotate", "--config", tenants)
    assert Path(path.strip()).read_text() != first
