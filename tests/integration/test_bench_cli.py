"""`headrace bench` and `headrace chat` as programs: output, exit codes, messages for mistakes."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.integration.bench_server import Script, tiny_server

SOURCE = Path(__file__).parents[2] / "src"
LIMIT_S = 60.0

pytestmark = pytest.mark.slow


@pytest.fixture
def script() -> Iterator[Script]:
    with tiny_server(Script()) as script:
        yield script


def environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.endswith("_API_KEY")}
    return {**kept, "PYTHONPATH": str(SOURCE), "COLUMNS": "120"}


def run(command: str, *arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", f"headrace.cli.{command}", *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        env=environment(),
        check=False,
    )


def test_bench_prints_tables_and_writes_json(script: Script, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    done = run(
        "bench", "--url", script.url, "--concurrency", "1,2", "--requests", "4", "--output-tokens", "3",
        "--slo-ttft-ms", "10000", "--json", str(path),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for word in ("TTFT", "ITL", "TPOT", "end to end", "goodput", "2 at a time", "as the server counted"):
        assert word in done.stdout
    assert [run["num_ok"] for run in json.loads(path.read_text())["runs"]] == [4, 4]


def test_bench_writes_nothing_but_json_to_stdout_when_asked(script: Script) -> None:
    done = run("bench", "--url", script.url, "--requests", "2", "--output-tokens", "2", "--json", "-")
    assert json.loads(done.stdout)["model"] == "tiny"
    assert "TTFT" in done.stderr


def test_bench_fails_when_no_request_succeeds(script: Script) -> None:
    script.behaviour = "cut"
    done = run("bench", "--url", script.url, "--requests", "2", "--warmup", "0", "--output-tokens", "5")
    assert done.returncode == 1
    assert "INVALID: no request succeeded" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "other"], "has no model 'other'. It has: tiny"),
        (["--rate", "5", "--concurrency", "2"], "exclude each other"),
        (["--rate", "-1"], "--rate is -1"),
        (["--duration", "0"], "--duration is 0"),
        (["--concurrency", "many"], "not a concurrency"),
        (["--input-tokens", "many"], "not a length"),
    ],
)
def test_a_mistake_gets_one_message_and_no_traceback(
    script: Script, arguments: list[str], message: str
) -> None:
    done = run("bench", "--url", script.url, *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("command", ["bench", "chat"])
def test_when_nothing_listens_the_address_and_the_remedy_are_named(command: str) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        question = ["hello"] if command == "chat" else []
        done = run(command, *question, "--url", f"http://127.0.0.1:{port}")
    assert done.returncode == 2
    assert f"127.0.0.1:{port}" in done.stderr
    assert "headrace up" in done.stderr
    assert "Traceback" not in done.stderr


def test_chat_answers_a_question_and_sends_the_system_message(script: Script) -> None:
    done = run("chat", "why?", "--url", script.url, "--system", "be brief", "--max-tokens", "4")
    assert (done.returncode, done.stdout) == (0, "xxxx\n")
    assert [message["role"] for message in script.bodies[0]["messages"]] == ["system", "user"]


def test_chat_takes_the_question_from_a_pipe(script: Script) -> None:
    done = run("chat", "--url", script.url, "--max-tokens", "2", stdin="why?\n")
    assert (done.returncode, done.stdout) == (0, "xx\n")
    assert script.bodies[0]["messages"][0]["content"] == "why?"


def test_chat_with_an_empty_pipe_says_what_to_write(script: Script) -> None:
    done = run("chat", "--url", script.url, stdin="")
    assert done.returncode == 2
    assert "stdin is empty" in done.stderr


@pytest.mark.parametrize(
    ("behaviour", "message"),
    [
        ("cut", "cut off"),
        ("error_event", "engine died"),
        ("http_500", "it broke"),
        ("no_done", "without [DONE]"),
    ],
)
def test_chat_says_how_an_answer_broke_off(script: Script, behaviour: str, message: str) -> None:
    script.behaviour = behaviour
    done = run("chat", "why?", "--url", script.url, "--max-tokens", "5")
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_ctrl_c_ends_a_question(script: Script) -> None:
    script.ttft_s = 30.0
    process = subprocess.Popen(
        [sys.executable, "-m", "headrace.cli.chat", "why?", "--url", script.url, "--max-tokens", "5"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    try:
        until_s = time.monotonic() + LIMIT_S
        while not script.bodies:
            assert time.monotonic() < until_s, "the question was never asked"
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=LIMIT_S)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 130
    assert "Traceback" not in errors


# Makes its standard input the controlling terminal, so that Ctrl-C reaches it as in a shell.
TAKE_TERMINAL = """
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.argv[1], sys.argv[1:])
"""


class Terminal:
    """`headrace chat` on a pseudo-terminal."""

    def __init__(self, *arguments: str) -> None:
        self._fd, theirs = pty.openpty()
        chat = [sys.executable, "-m", "headrace.cli.chat", *arguments]
        self.process = subprocess.Popen(
            [sys.executable, "-c", TAKE_TERMINAL, *chat],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env=environment(),
            start_new_session=True,
        )
        os.close(theirs)
        self.text = ""

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._fd)

    def expect(self, text: str) -> None:
        """Read until `text` comes; what came up to its end is consumed."""
        until_s = time.monotonic() + LIMIT_S
        while text not in self.text:
            readable, _, _ = select.select([self._fd], [], [], max(0.0, until_s - time.monotonic()))
            assert readable, f"{text!r} never came; the terminal shows {self.text!r}"
            self.text += os.read(self._fd, 65536).decode()
        self.text = self.text.partition(text)[2]

    def type(self, text: str) -> None:
        os.write(self._fd, text.encode())

    def leave(self) -> int:
        """Press Ctrl-C until the program ends; return the exit code. Once is nearly always enough, but
        Python's `input` misses a signal that arrives between its prompt and its read."""
        until_s = time.monotonic() + LIMIT_S
        while time.monotonic() < until_s:
            self.type("\x03")
            with contextlib.suppress(subprocess.TimeoutExpired):
                return self.process.wait(1.0)
        raise AssertionError(f"chat did not end; the terminal shows {self.text!r}")


def test_in_a_conversation_ctrl_c_stops_the_answer_and_then_leaves(script: Script) -> None:
    with Terminal("--url", script.url, "--max-tokens", "3") as terminal:
        terminal.expect("Ctrl-D leaves")
        terminal.expect("> ")
        terminal.type("one\n")
        terminal.expect("xxx")
        terminal.expect("> ")
        script.ttft_s = 60.0
        terminal.type("two\n")
        until_s = time.monotonic() + LIMIT_S
        while len(script.bodies) < 2:
            assert time.monotonic() < until_s, "the second question was never asked"
            time.sleep(0.01)
        terminal.type("\x03")
        terminal.expect("…")
        terminal.expect("> ")
        script.ttft_s = 0.0
        terminal.type("three\n")
        terminal.expect("xxx")
        # The unanswered question is forgotten, the answered one is part of the conversation.
        assert [message["content"] for message in script.bodies[2]["messages"]] == ["one", "xxx", "three"]
        terminal.expect("> ")
        assert terminal.leave() == 0
