"""URLs, keys and model choice."""

from __future__ import annotations

import pytest

from headrace.bench import target as target_module
from headrace.bench.load import LoadSpec
from headrace.bench.suite import make_specs, parse_concurrency
from headrace.bench.target import TargetError, choose_model, find_api_key, normalise_url, parse_target
from headrace.bench.workload import WorkloadError


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://127.0.0.1:8000", "http://127.0.0.1:8000/v1"),
        ("http://127.0.0.1:8000/", "http://127.0.0.1:8000/v1"),
        ("http://127.0.0.1:8000/v1/", "http://127.0.0.1:8000/v1"),
        ("https://example.com/api/v3", "https://example.com/api/v3"),
    ],
)
def test_a_url_without_a_path_gets_v1(url: str, expected: str) -> None:
    assert normalise_url(url) == expected


@pytest.mark.parametrize(
    "url",
    [
        "127.0.0.1:8000",
        "ftp://x/v1",
        "http://",
        "http://x:99999/",
        "http://x:0/",
        "http://x/v1?a=1",
        "http://x y/",
    ],
)
def test_what_is_no_url_of_a_server_is_refused(url: str) -> None:
    with pytest.raises(TargetError, match="not"):
        normalise_url(url)


def test_the_head_names_the_host_the_length_and_the_key() -> None:
    head = parse_target("http://[::1]:8000", "/completions", "secret").head(12).decode()
    assert head.startswith("POST /v1/completions HTTP/1.1\r\nHost: [::1]:8000\r\n")
    assert "Authorization: Bearer secret\r\n" in head
    assert head.endswith("Content-Length: 12\r\n\r\n")


def test_a_key_cannot_add_header_lines_and_is_never_shown() -> None:
    with pytest.raises(TargetError, match="API key") as caught:
        parse_target("http://x", "/completions", "se\r\ncret: 1")
    assert "cret" not in str(caught.value)
    assert "secret" not in repr(parse_target("http://x", "/completions", "secret"))


def test_https_means_tls_on_443() -> None:
    target = parse_target("https://example.com", "/completions")
    assert (target.is_tls, target.port) == (True, 443)


def test_headraces_own_key_comes_first() -> None:
    both = {"OPENAI_API_KEY": "b", "HEADRACE_API_KEY": "a"}
    assert find_api_key(both) == "a"
    assert find_api_key({"OPENAI_API_KEY": "b", "HEADRACE_API_KEY": ""}) == "b"
    assert find_api_key({}) == ""


@pytest.mark.parametrize(
    ("models", "wanted", "outcome"),
    [
        (["a"], "", "a"),
        (["a", "b"], "b", "b"),
        (None, "x", "x"),
        (["a", "b"], "", TargetError("several models; choose one with --model: a, b")),
        (["a", "b"], "c", TargetError("no model 'c'. It has: a, b")),
        ([], "", TargetError("has no models")),
        (None, "", TargetError("name one with --model")),
    ],
)
def test_the_model_is_the_named_one_or_the_only_one(
    models: list[str] | None, wanted: str, outcome: str | TargetError, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(target_module, "list_models", lambda url, headers: models)
    if isinstance(outcome, TargetError):
        with pytest.raises(TargetError) as caught:
            choose_model("http://x/v1", wanted, {})
        assert str(outcome) in str(caught.value)
    else:
        assert choose_model("http://x/v1", wanted, {}) == outcome


def test_a_list_of_concurrencies_is_a_list_of_runs() -> None:
    assert parse_concurrency("1,4, 16") == [1, 4, 16]
    base = LoadSpec(concurrency=1, max_requests=1)
    specs = make_specs(base, [1, 16], None, None)
    assert [(spec.concurrency, spec.max_requests, spec.warmup_requests) for spec in specs] == [
        (1, 8, 1),
        (16, 64, 16),
    ]


@pytest.mark.parametrize("text", ["0", "a", "1,,2", "99999", "-1"])
def test_a_bad_concurrency_is_refused(text: str) -> None:
    with pytest.raises(WorkloadError, match="concurrency"):
        parse_concurrency(text)


def test_an_open_loop_without_an_end_gets_a_duration() -> None:
    [spec] = make_specs(LoadSpec(rate=5.0, max_requests=1), [], None, 0)
    assert (spec.rate, spec.max_requests, spec.duration_s) == (5.0, None, 30.0)
