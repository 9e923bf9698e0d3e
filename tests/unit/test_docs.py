"""The documents hold together: links lead somewhere, examples load, invariants name their tests."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from headrace.api.config_loader import load_config, parse_config

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/**/*.md")])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_that_exist(page: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text())
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert missing == []


def test_the_readme_stays_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


@pytest.mark.parametrize("example", sorted(ROOT.glob("examples/*.yaml")), ids=lambda path: path.name)
def test_every_example_config_loads(example: Path) -> None:
    assert load_config(example).endpoints


def test_config_snippets_of_the_guides_load() -> None:
    import yaml

    for page in ROOT.glob("docs/guides/*.md"):
        for block in re.findall(r"```yaml\n(.*?)```", page.read_text(), flags=re.DOTALL):
            assert parse_config(yaml.safe_load(block)).endpoints


def invariants() -> dict[str, list[tuple[str, str]]]:
    """Return the tests that each entry names, as (file, function); without a function the whole file."""
    rows = [
        line
        for line in (ROOT / "INVARIANTS.md").read_text().splitlines()
        if re.match(r"\| \w+ \| \*\*", line)
    ]
    return {row: re.findall(r"`(tests/[\w/.]+)(?:::(\w+))?`", row.rsplit(" | ", 1)[1]) for row in rows}


def test_every_invariant_names_tests_and_each_of_them_runs() -> None:
    entries = invariants()
    assert len(entries) > 50
    for row, tests in entries.items():
        assert tests, f"names no test: {row}"
        for path, function in tests:
            assert (ROOT / path).is_file(), path
            assert Path(path).name.startswith("test_"), f"{path} is not collected"
            if function:
                # A test, or what hypothesis checks after each of its steps.
                runs = rf"(^(async )?def test_|@invariant\(\)\n    def ){function.removeprefix('test_')}\("
                text = (ROOT / path).read_text()
                assert re.search(runs, text, re.MULTILINE), f"{path}::{function} is no test"


def test_decisions_are_numbered_one_page_and_complete() -> None:
    decisions = sorted((ROOT / "docs/adr").glob("*.md"))
    assert [int(path.name[:4]) for path in decisions] == list(range(1, len(decisions) + 1))
    for path in decisions:
        text = path.read_text()
        assert len(text.splitlines()) <= 60, path
        assert "**Rejected.**" in text, path


def test_the_config_reference_is_what_the_tree_says() -> None:
    from docs.generate_reference import PAGE, render

    assert render() == PAGE.read_text(), "run `make docs`"


def test_no_source_file_grew_beyond_the_house_rule() -> None:
    too_long = {
        str(path.relative_to(ROOT)): length
        for pattern in ("*.py", "*.cpp", "*.h")
        for path in ROOT.glob(f"src/**/{pattern}")
        if (length := len(path.read_text().splitlines())) > 400
    }
    assert too_long == {}


def test_the_metrics_and_request_log_references_are_what_the_code_exports() -> None:
    from docs.generate_observability import METRICS_PAGE, REQUEST_LOG_PAGE, render_metrics, render_request_log

    assert render_metrics() == METRICS_PAGE.read_text(), "run `make docs`"
    assert render_request_log() == REQUEST_LOG_PAGE.read_text(), "run `make docs`"
