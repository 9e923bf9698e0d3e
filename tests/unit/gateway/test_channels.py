"""The router's connection to the controller lasts, however the controller ends it."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from headrace.api.messages import Demand
from headrace.gateway.channels import ControllerLink


class ClosedWriter:
    """As uvloop has it in the moment after a connection ended: its reader hears of the end in the next."""

    def __init__(self, reader: asyncio.StreamReader) -> None:
        asyncio.get_running_loop().call_soon(reader.set_exception, ConnectionResetError("it was reset"))

    def is_closing(self) -> bool:
        return True

    def write(self, data: bytes) -> None:
        raise RuntimeError("unable to perform operation; the handler is closed")


async def test_a_controller_that_ends_in_the_moment_of_a_demand_counts_as_gone() -> None:
    link = ControllerLink("controller.sock", 0.1, lambda: Demand("g1", 1, [], []), lambda message: None)
    reader = asyncio.StreamReader()
    writer: Any = ClosedWriter(reader)
    with pytest.raises(ConnectionResetError, match="it was reset"):
        await link._serve(reader, writer)
