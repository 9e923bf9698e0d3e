"""The parts that the programs in benchmarks/ share: process roles, CPU windows, reports."""

from __future__ import annotations

import json
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest
from benchmarks import __main__ as program
from benchmarks import report as report_module
from benchmarks.machine import describe_hardware, describe_software
from benchmarks.processes import CpuSample, cpu_window, role_of
from benchmarks.report import Aim, Report, Table


class FakeProcess:
    """What role_of asks of a process."""

    def __init__(self, name: str, *command: str) -> None:
        self._name = name
        self._command = command

    def name(self) -> str:
        return self._name

    def cmdline(self) -> list[str]:
        return list(self._command)


@pytest.mark.parametrize(
    ("process", "role"),
    [
        (FakeProcess("python", "headrace: front chat-1     "), "front"),
        (FakeProcess("python", "headrace: router"), "router"),
        (FakeProcess("haproxy", "haproxy", "-W", "-f", "x"), "haproxy"),
        (FakeProcess("python", "python", "-m", "benchmarks.engines.tether"), ""),
        (FakeProcess("python"), ""),
    ],
)
def test_a_process_has_the_role_that_its_title_says(process: FakeProcess, role: str) -> None:
    assert role_of(process) == role  # type: ignore[arg-type]


def test_cpu_is_summed_by_role_and_a_new_process_counts_from_zero() -> None:
    before = CpuSample(1.0, {1: ("front", 2.0), 2: ("haproxy", 1.0), 3: ("haproxy", 4.0)})
    after = CpuSample(2.0, {1: ("front", 2.5), 2: ("haproxy", 1.25), 3: ("haproxy", 4.5), 4: ("front", 1.0)})
    assert after.since(before) == {"front": 1.5, "haproxy": 0.75}


def test_a_cpu_window_lies_inside_the_load() -> None:
    start_s = time.monotonic()
    with cpu_window(0.01, 0.02) as window:
        until_s = start_s + 5
        while len(window.samples) < 2:
            assert time.monotonic() < until_s
            time.sleep(0.001)
    first_s, last_s = window.span_s
    assert start_s + 0.01 <= first_s <= last_s - 0.02


def test_a_load_that_is_shorter_than_its_window_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="ended before its window"), cpu_window(30.0, 30.0):
        pass


def test_a_report_holds_aims_tables_caveats_and_the_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report_module, "FOLDER", tmp_path)
    report = Report("tokens", "Title", "Method.", started=datetime(2026, 11, 21, 12, 0, tzinfo=UTC))
    report.aims.append(Aim("figure", "at most 1", "2", is_met=False))
    report.tables.append(Table("Results", ("a", "b"), [["1", "2"]]))
    report.caveats.append("noisy")
    page, data = report.write()
    assert (page.name, data.name) == ("2026-11-21-tokens.md", "2026-11-21-tokens.json")
    text = page.read_text()
    for part in (
        "`python -m benchmarks tokens`",
        "**not met**",
        "| 1 | 2 |",
        "- noisy",
        "- cores:",
        "- headrace:",
    ):
        assert part in text
    assert json.loads(data.read_text())["tables"][0]["rows"] == [["1", "2"]]


def test_machine_and_versions_are_known() -> None:
    assert int(describe_hardware()["cores"]) >= 1
    assert "Python" in describe_software()


def test_an_unknown_benchmark_is_refused_with_the_known_ones(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["benchmarks", "speed"])
    with pytest.raises(SystemExit) as caught:
        program.main()
    assert caught.value.code == 2
    assert ", ".join(program.NAMES) in capsys.readouterr().err
