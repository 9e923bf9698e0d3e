"""What `headrace status --explain ENDPOINT` shows, from a controller's socket to the terminal."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from headrace.api.framing import FrameDecoder, encode_frame
from headrace.api.messages import AdminCommand, AdminReply, ExplainedNumber, ExplainEndpoint, Explanation
from headrace.cli.explain import format_number, render_explanation
from headrace.cli.main import EXIT_MISTAKE, main
from headrace.control.specs import ADMIN_SOCKET

EXPLANATION = Explanation(
    "chat: 3 replicas and 1 on standby",
    "work for 2.10 full replicas arrives",
    [
        ExplainedNumber("demand", 2.1, "replicas", "full ones [that] the work keeps busy"),
        ExplainedNumber("ready", 3.0, "replicas"),
    ],
    ["5 s ago: 2 -> 3: work for 2.10 full replicas arrives"],
)


@pytest.fixture
def controller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[AdminCommand]]:
    """Answer one command like a controller; give the commands that came."""
    monkeypatch.setattr("headrace.cli.options.find_run_directory", lambda name: tmp_path)
    commands: list[AdminCommand] = []
    decoder: FrameDecoder[AdminCommand] = FrameDecoder(AdminCommand)

    def answer(server: socket.socket) -> None:
        connection, _ = server.accept()
        with connection:
            while not commands:
                commands.extend(decoder.feed(connection.recv(65536)))
            connection.sendall(encode_frame(AdminReply(explanation=EXPLANATION)))

    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as server:
        server.settimeout(10)
        server.bind(str(tmp_path / ADMIN_SOCKET))
        server.listen()
        thread = threading.Thread(target=answer, args=(server,))
        thread.start()
        yield commands
        thread.join(10)


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["headrace", "status", *arguments])
    try:
        main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def test_the_terminal_shows_the_decision_every_number_and_the_changes(
    controller: list[AdminCommand], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    assert run(monkeypatch, "--explain", "chat") == 0
    out = capsys.readouterr().out
    assert controller == [ExplainEndpoint("chat")]
    for text in ("chat: 3 replicas", "work for 2.10", "2.1", "full ones [that] the work", "5 s ago: 2 -> 3"):
        assert text in out


@pytest.mark.usefixtures("controller")
def test_programs_get_the_same_as_json(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "--explain", "chat", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["numbers"][0]["name"] == "demand"
    assert told["history"] == EXPLANATION.history


def test_watching_an_explanation_is_a_mistake(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert run(monkeypatch, "--explain", "chat", "--watch") == EXIT_MISTAKE
    assert "without --watch" in capsys.readouterr().err


def test_an_endpoint_that_never_changed_says_so() -> None:
    console = Console(width=100)
    with console.capture() as captured:
        console.print(render_explanation(Explanation("chat: 1 replicas", "replicas.min is 1", [])))
    assert "no change yet" in captured.get()


@pytest.mark.parametrize(("value", "text"), [(3.0, "3"), (0.70001, "0.7"), (1234.5, "1.23e+03"), (-0.0, "0")])
def test_numbers_are_short(value: float, text: str) -> None:
    assert format_number(ExplainedNumber("n", value, "s")) == text
