"""The example of docs/guides/ray-serve.md: a Ray Serve application whose model is a headrace endpoint."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from tests.e2e.conftest import ROOT, free_port
from tests.slow.ray_serve_rig import running, short_directory

import headrace

EXAMPLE = ROOT / "examples" / "ray_serve"


@pytest.fixture(scope="module")
def system() -> Iterator[headrace.System]:
    with headrace.serve(
        {
            "endpoints": {"chat": {"model": "smollm2-135m-instruct", "replicas": 1}},
            "gateway": {"bind": "127.0.0.1:0"},
        }
    ) as system:
        yield system


@contextlib.contextmanager
def running_application(directory: Path, base_url: str) -> Iterator[str]:
    """`serve run serve.yaml` on a Ray of its own; yields the application's address."""
    port = free_port()
    shutil.copy(EXAMPLE / "app.py", directory)
    config = (EXAMPLE / "serve.yaml").read_text()
    assert "http://127.0.0.1:8000/v1" in config
    assert "port: 8001" in config
    config = config.replace("http://127.0.0.1:8000/v1", base_url).replace("port: 8001", f"port: {port}")
    (directory / "serve.yaml").write_text(config)
    url = f"http://127.0.0.1:{port}"

    def is_deployed() -> bool:
        with contextlib.suppress(httpx.HTTPError):  # 404 before it knows the application
            return httpx.post(f"{url}/ask", json={}, timeout=30).status_code == 422
        return False

    with running(directory, "serve", "run", "serve.yaml", is_up=is_deployed):
        yield url


def events_of(text: str) -> list[dict[str, object]]:
    return [json.loads(line.removeprefix("data: ")) for line in text.splitlines() if line]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(os.geteuid() != 0, reason="namespaces of its own for Ray need root")
def test_the_example_answers_from_its_passages_and_says_when_its_model_is_gone(
    system: headrace.System,
) -> None:
    with (
        short_directory() as directory,
        running_application(directory, system.url) as url,
        httpx.Client(timeout=60) as client,
    ):
        answer = client.post(f"{url}/ask", json={"question": "What is the capital of Italy?"})
        assert answer.status_code == 200
        *texts, last = events_of(answer.text)
        assert "Rome" in "".join(str(event["text"]) for event in texts)
        assert len(texts) > 3, "it came in pieces"
        assert last["sources"] == ["Rome is the capital of Italy.", "The Po is the longest river of Italy."]

        refused = client.post(f"{url}/ask", json={"question": ""})
        assert refused.status_code == 422

        system.close()
        answer = client.post(f"{url}/ask", json={"question": "What is a headrace?"})
        assert events_of(answer.text)[-1]["error"] == "the model did not answer: APIConnectionError"
