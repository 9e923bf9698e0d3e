"""The names under which a replica answers."""

from __future__ import annotations

import pytest

from headrace.errors import NotFound
from headrace.replica.served_models import ServedModels


def test_an_endpoint_and_its_adapters_are_served_and_nothing_else() -> None:
    models = ServedModels("chat", ["poet", "law"])
    assert models.names == ("chat", "poet", "law")
    assert [models.adapter_of(name) for name in models.names] == ["", "poet", "law"]
    for name in models.names:
        models.check(name)
    with pytest.raises(NotFound, match=r"model 'painter' does not exist; this replica serves 'chat', 'poet'"):
        models.check("painter")
