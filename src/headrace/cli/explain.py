"""`headrace status --explain ENDPOINT`: a scaling decision with every number behind it.

Must not know how decisions are made.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import RenderableType

    from headrace.api.messages import ExplainedNumber, Explanation


def ask_explanation(endpoint: str, name: str) -> Explanation:
    """Ask a running system. Raises HeadraceError."""
    from headrace.api.messages import ExplainEndpoint
    from headrace.cli.options import ask_system

    reply = ask_system(name, ExplainEndpoint(endpoint))
    assert reply.explanation is not None
    return reply.explanation


def render_explanation(explanation: Explanation) -> RenderableType:
    """Return the decision, its reason, its numbers and the last changes."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="underline")
    table.add_column("number", no_wrap=True)
    table.add_column("value", justify="right", no_wrap=True)
    table.add_column("unit", no_wrap=True)
    table.add_column("where it comes from")
    for number in explanation.numbers:
        table.add_row(Text(number.name), format_number(number), number.unit, Text(number.note))
    history = "\n".join(explanation.history) or "no change yet"
    return Group(
        Text(explanation.decision, style="bold"),
        Text(explanation.reason),
        Text(),
        table,
        Text(),
        Text("Changes", style="underline"),
        Text(history),
    )


def format_number(number: ExplainedNumber) -> str:
    """Return three digits of a number; whole numbers whole."""
    value = number.value
    if math.isfinite(value) and value == int(value) and abs(value) < 1e9:
        return str(int(value))
    return f"{value:.3g}"
