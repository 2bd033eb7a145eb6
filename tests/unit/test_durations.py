"""Lengths of time: what is read, what is refused, and that writing and reading agree."""

import math
from contextlib import suppress
from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from catfeeder_cron.times import format_duration, parse_duration

LONGEST = timedelta(days=36_500)
any_duration = st.timedeltas(timedelta(0), LONGEST)
units = st.sampled_from([("s", 1), ("m", 60), ("h", 3600), ("d", 86_400)])


@given(any_duration)
def test_a_formatted_duration_is_read_as_the_same_length(duration: timedelta) -> None:
    assert parse_duration(format_duration(duration)) == duration


@given(st.integers(0, 36_500), units)
def test_a_number_and_a_unit_are_that_many_seconds(number: int, unit: tuple[str, int]) -> None:
    letter, seconds = unit
    assert parse_duration(f"{number}{letter}") == timedelta(seconds=number * seconds)
    assert parse_duration(number * seconds) == parse_duration(f"{number}{letter}")


@given(st.one_of(st.integers(), st.floats(), st.text(), st.text("0123456789.smhd-", max_size=20), st.none()))
def test_whatever_comes_is_a_length_within_bounds_or_a_value_error(value: object) -> None:
    with suppress(ValueError):
        assert timedelta(0) <= parse_duration(value) <= LONGEST


@pytest.mark.parametrize(
    ("duration", "text"),
    [
        (timedelta(0), "0s"),
        (timedelta(seconds=90), "90s"),
        (timedelta(seconds=1800), "30m"),
        (timedelta(hours=36), "36h"),
        (timedelta(days=30), "30d"),
        (timedelta(milliseconds=500), "0.5s"),
    ],
)
def test_a_duration_is_written_in_the_largest_unit_that_divides_it(duration: timedelta, text: str) -> None:
    assert format_duration(duration) == text


@pytest.mark.parametrize(
    "value",
    [True, "10", "", "m", "1.5.5s", "30 m", "30M", "1h30m", "-5s", -1, math.nan, math.inf, 10**400, "999999999999d"],
)
def test_near_misses_are_refused(value: object) -> None:
    with pytest.raises(ValueError, match="a duration"):
        parse_duration(value)
