"""What the README promises, on the real model, through the whole design."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import openai
import psutil
import pytest

from tests.e2e.conftest import QUICKSTART, ROOT, RunningSystem, wait_until

pytestmark = pytest.mark.slow
QUESTION = [{"role": "user", "content": "What is the capital of Italy?"}]


def client_of(system: RunningSystem) -> openai.OpenAI:
    return openai.OpenAI(base_url=system.url, api_key="none", max_retries=0, timeout=60)


def test_the_openai_client_gets_a_correct_streamed_answer(quickstart: RunningSystem) -> None:
    stream = client_of(quickstart).chat.completions.create(
        model="chat",
        messages=QUESTION,
        temperature=0,
        max_tokens=32,
        stream=True,
        stream_options={"include_usage": True},
    )
    text, finish_reasons, usage = "", [], None
    for chunk in stream:
        for choice in chunk.choices:
            text += choice.delta.content or ""
            if choice.finish_reason:
                finish_reasons.append(choice.finish_reason)
        usage = chunk.usage or usage
    assert "Rome" in text
    assert finish_reasons == ["stop"]
    assert usage is not None
    assert usage.completion_tokens > 1
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


def test_the_same_question_without_streaming_gives_the_same_text(quickstart: RunningSystem) -> None:
    client = client_of(quickstart)
    answers = {
        client.chat.completions.create(model="chat", messages=QUESTION, temperature=0, max_tokens=32)
        .choices[0]
        .message.content
        for _ in range(4)
    }
    assert len(answers) == 1
    assert "Rome" in (answers.pop() or "")


def test_the_same_seed_gives_the_same_answer_on_either_replica(quickstart: RunningSystem) -> None:
    client = client_of(quickstart)
    answers = set()
    replicas = set()
    for _ in range(6):
        response = client.chat.completions.with_raw_response.create(
            model="chat", messages=QUESTION, temperature=0.8, seed=7, max_tokens=24
        )
        replicas.add(response.headers["x-headrace-replica"])
        answers.add(response.parse().choices[0].message.content)
    assert len(answers) == 1, answers


def test_every_process_says_who_it_is(quickstart: RunningSystem) -> None:
    titles = quickstart.titles()
    for title in (
        *("headrace: controller", "headrace: router"),
        *("headrace: front chat-1", "headrace: front chat-2"),
        *("headrace: engine chat-1", "headrace: engine chat-2"),
    ):
        assert any(found.startswith(title) for found in titles), (title, titles)
    assert any("haproxy" in title for title in titles)


def test_the_whole_system_stays_below_two_gigabytes(quickstart: RunningSystem) -> None:
    processes = [psutil.Process(quickstart.process.pid), *quickstart.descendants()]
    total_bytes = sum(process.memory_full_info().pss for process in processes)
    assert total_bytes < 2 * 2**30


def test_an_unknown_model_gets_404_with_the_known_ones(quickstart: RunningSystem) -> None:
    with pytest.raises(openai.NotFoundError, match="chat"):
        client_of(quickstart).chat.completions.create(model="nope", messages=QUESTION)


def test_models_are_listed(quickstart: RunningSystem) -> None:
    assert [model.id for model in client_of(quickstart).models.list()] == ["chat"]
    assert client_of(quickstart).models.retrieve("chat").id == "chat"


def test_scaling_up_and_down_drops_no_request(quickstart: RunningSystem) -> None:
    assert quickstart.command("scale", "chat", "3").returncode == 0
    client = client_of(quickstart)

    def ready_replicas() -> int:
        client.chat.completions.create(model="chat", messages=QUESTION, max_tokens=2)
        return int(quickstart.status()["endpoints"][0]["ready"])

    wait_until(lambda: ready_replicas() == 3, 60, "three replicas are ready")
    assert quickstart.command("scale", "chat", "2").returncode == 0
    wait_until(lambda: ready_replicas() == 2, 60, "two replicas are left")
    wait_until(lambda: len(quickstart.status()["replicas"]) == 2, 60, "the third is gone")


@pytest.mark.parametrize("page", ["README.md", "docs/guides/first-steps.md"])
def test_python_and_curl_snippets_of_the_page_run_as_written(
    quickstart: RunningSystem, page: str, tmp_path: Path
) -> None:
    """Every python block, and every curl command, against the running system instead of port 8000."""
    text = (ROOT / page).read_text().replace("http://127.0.0.1:8000/v1", quickstart.url)
    blocks = re.findall(r"```(python|bash)\n(.*?)```", text, flags=re.DOTALL)
    snippets = [
        [sys.executable, "-c", code] if language == "python" else ["bash", "-c", code]
        for language, code in blocks
        if language == "python" or code.startswith("curl")
    ]
    assert snippets
    for command in snippets:
        result = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=100,
            env=quickstart.environment | {"TMPDIR": str(tmp_path), "XDG_RUNTIME_DIR": str(tmp_path)},
        )
        assert result.returncode == 0, result.stderr
        assert "Rome" in result.stdout, (command, result.stdout)


def test_headrace_chat_answers_in_the_terminal(quickstart: RunningSystem) -> None:
    result = quickstart.command(
        "chat", "--url", quickstart.url, "--temperature", "0", "What is the capital of Italy?", timeout_s=60
    )
    assert result.returncode == 0, result.stderr
    assert "Rome" in result.stdout


def test_headrace_bench_measures_the_system(quickstart: RunningSystem) -> None:
    result = quickstart.command(
        *("bench", "--url", quickstart.url, "--model", "chat"),
        *("--concurrency", "2", "--requests", "6", "--output-tokens", "8", "--json", "-"),
        timeout_s=90,
    )
    assert result.returncode == 0, result.stderr


def test_ctrl_c_drains_and_leaves_nothing(tmp_path: Path) -> None:
    system = RunningSystem(tmp_path, str(QUICKSTART), "--set", "endpoints.chat.replicas=1")
    try:
        system.wait_ready()
        processes = system.descendants()
        assert len(processes) >= 5
        stream = client_of(system).chat.completions.create(
            model="chat", messages=QUESTION, max_tokens=60, stream=True, extra_body={"ignore_eos": True}
        )
        next(iter(stream))
        system.process.send_signal(2)
        num_chunks = sum(1 for _ in stream)
        assert num_chunks > 20, "the open stream was drained to its end"
        assert system.process.wait(40) == 0, system.log.read_text()
        wait_until(lambda: not psutil.wait_procs(processes, timeout=0)[1], 5, "all processes are gone")
        left = [path for path in tmp_path.rglob("*") if path != system.log and not path.is_dir()]
        packed = tmp_path / "state/headrace/packed"
        assert [path for path in left if path.parent != packed] == [], "only what makes the next start faster"
    finally:
        system.close()
