"""Lengths of time as people write them: 1800 (seconds), "90s", "30m", "12h", "30d"."""

import re
from datetime import timedelta
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator

LONGEST = timedelta(days=36_500)
"""Adding this to a time of our century overflows nowhere, and nobody means more."""

_UNITS = {"d": timedelta(days=1), "h": timedelta(hours=1), "m": timedelta(minutes=1), "s": timedelta(seconds=1)}
_TEXT = re.compile(r"([0-9]{1,12})(\.[0-9]{1,9})?([smhd])")
_EXPECTED = 'a duration: seconds, or text such as "90s", "30m", "12h", "30d", up to 36500d'


def parse_duration(value: object) -> timedelta:
    """Return the length of time, which is never negative. A ValueError's text says what is expected."""
    try:
        duration = _parse(value)
    except (OverflowError, ValueError):
        duration = None
    if duration is None or not timedelta(0) <= duration <= LONGEST:
        raise ValueError(_EXPECTED)
    return duration


def _parse(value: object) -> timedelta | None:
    if isinstance(value, timedelta):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return timedelta(seconds=value)
    if isinstance(value, str) and (match := _TEXT.fullmatch(value)):
        whole, fraction, unit = match.groups()
        return int(whole) * _UNITS[unit] + float(fraction or 0) * _UNITS[unit]
    return None


def format_duration(duration: timedelta) -> str:
    """Return the text that parse_duration reads as the same length, in the largest unit that divides it."""
    for unit, length in _UNITS.items():
        if duration and not duration % length:
            return f"{duration // length}{unit}"
    seconds, rest = divmod(duration, _UNITS["s"])
    return f"{seconds}.{rest.microseconds:06}".rstrip("0").rstrip(".") + "s"


def within(shortest: timedelta = timedelta(0), longest: timedelta = LONGEST) -> AfterValidator:
    """Return the check that a duration lies between the two: `Annotated[Duration, within(...)]`."""

    def check(duration: timedelta) -> timedelta:
        if duration < shortest:
            raise ValueError(f"at least {format_duration(shortest)}")
        if duration > longest:
            raise ValueError(f"at most {format_duration(longest)}")
        return duration

    return AfterValidator(check)


Duration = Annotated[timedelta, BeforeValidator(parse_duration)]
Interval = Annotated[Duration, within(timedelta(seconds=1))]
StatementTimeout = Annotated[Duration, within(timedelta(milliseconds=1), timedelta(days=24))]
"""What PostgreSQL takes: whole milliseconds in 31 bits, of which 0 would mean "without end"."""
