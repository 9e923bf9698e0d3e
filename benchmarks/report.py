"""A benchmark's report: tables, aims beside what was measured, caveats; as Markdown and as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.machine import describe_hardware, describe_software

FOLDER = Path(__file__).parent / "reports"


class Skipped(Exception):
    """A benchmark lacks what it reads; the message says what, and where it is looked for."""


@dataclass(frozen=True)
class Aim:
    """What was wanted, and what came."""

    figure: str
    aim: str
    measured: str
    is_met: bool


@dataclass(frozen=True)
class Table:
    """Rows of text under headers."""

    title: str
    headers: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass
class Report:
    """Born before the measurement, so that the machine's load before it is on record."""

    name: str
    title: str
    method: str
    command: str = ""
    aims: list[Aim] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    caveats: list[str] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)
    """Everything measured, for programs."""
    started: datetime = field(default_factory=lambda: datetime.now(UTC))
    hardware: dict[str, str] = field(default_factory=describe_hardware)
    software: dict[str, str] = field(default_factory=describe_software)

    def __post_init__(self) -> None:
        self.command = self.command or f"python -m benchmarks {self.name}"

    def to_markdown(self) -> str:
        """Return the whole report as one page."""
        lines = [
            f"# {self.title}",
            "",
            f"{self.started:%Y-%m-%d %H:%M} UTC · `{self.command}`",
            "",
            self.method,
        ]
        if self.aims:
            rows = [(a.figure, a.aim, a.measured, "met" if a.is_met else "**not met**") for a in self.aims]
            lines += ["", *_table(("figure", "aim", "measured", ""), rows)]
        for table in self.tables:
            lines += ["", f"## {table.title}", "", *_table(table.headers, table.rows)]
        if self.caveats:
            lines += ["", "## Caveats", "", *(f"- {caveat}" for caveat in self.caveats)]
        lines += ["", "## Machine and versions", ""]
        lines += [f"- {name}: {value}" for name, value in {**self.hardware, **self.software}.items()]
        return "\n".join(lines) + "\n"

    def write(self) -> list[Path]:
        """Write NAME.md and NAME.json under the date; a later run of the same day replaces them."""
        FOLDER.mkdir(exist_ok=True)
        stem = FOLDER / f"{self.started:%Y-%m-%d}-{self.name}"
        page, data = stem.with_suffix(".md"), stem.with_suffix(".json")
        page.write_text(self.to_markdown())
        tree = {**asdict(self), "started": self.started.isoformat(timespec="seconds")}
        data.write_text(json.dumps(tree, indent=1, ensure_ascii=False) + "\n")
        return [page, data]


def _table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [
        "| " + " | ".join(headers) + " |",
        "|" + "---|" * len(headers),
        *("| " + " | ".join(row) + " |" for row in rows),
    ]
