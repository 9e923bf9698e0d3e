"""Sizes, durations, clocks and errors as people and programs read them."""

from __future__ import annotations

import inspect

import pytest

from headrace import errors
from headrace.clock import VirtualClock
from headrace.units import format_bytes, format_seconds


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (3 * 2**20, "3.0 MiB"), (5.5 * 2**30, "5.5 GiB")],
)
def test_bytes_are_shown_in_the_largest_fitting_unit(num_bytes: float, text: str) -> None:
    assert format_bytes(num_bytes) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.00035, "350 µs"), (0.012, "12 ms"), (3.21, "3.2 s"), (250, "4 min 10 s")],
)
def test_durations_are_shown_in_the_unit_that_reads_best(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


def test_a_virtual_clock_moves_only_when_told() -> None:
    clock = VirtualClock(5.0)
    assert (clock.now_s(), clock.now_s()) == (5.0, 5.0)
    clock.advance(2.5)
    assert clock.now_s() == 7.5
    with pytest.raises(AssertionError):
        clock.advance(-1)


def test_every_error_class_is_in_the_tree_at_the_top_of_the_file() -> None:
    classes = [
        name
        for name, value in vars(errors).items()
        if inspect.isclass(value) and issubclass(value, errors.HeadraceError)
    ]
    assert errors.__doc__ is not None
    assert [name for name in classes if name not in errors.__doc__] == []


def test_a_config_error_keeps_all_problems() -> None:
    error = errors.ConfigError(["a: wrong", "b: missing"])
    assert error.problems == ["a: wrong", "b: missing"]
    assert str(error) == "a: wrong\nb: missing"


def test_request_errors_carry_status_type_and_code() -> None:
    error = errors.NotFound("model 'x' is not here", param="model")
    assert (error.status, error.type, error.code, error.param) == (
        404,
        "invalid_request_error",
        "model_not_found",
        "model",
    )
