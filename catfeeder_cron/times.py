"""Reads and writes instants and durations, and reads the clock that goes on during suspension."""

import re
import time
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from typing import overload

LONGEST = timedelta(days=36_500)
"""The longest duration that settings may have. Adding it to a time of our century overflows nowhere."""

_UNITS = {"d": timedelta(days=1), "h": timedelta(hours=1), "m": timedelta(minutes=1), "s": timedelta(seconds=1)}
_TEXT = re.compile(r"([0-9]{1,12})(\.[0-9]{1,9})?([smhd])")
_EXPECTED = 'a duration: seconds, or text such as "90s", "30m", "12h", "30d", up to 36500d'
_RETRY_AFTER_SECONDS = re.compile(r"\d{1,30}(\.\d{1,9})?", re.ASCII)


@overload
def timestamp(instant: datetime) -> str: ...
@overload
def timestamp(instant: datetime | None) -> str | None: ...
def timestamp(instant: datetime | None) -> str | None:
    """Return the instant as ISO 8601 in UTC, with a final Z."""
    return None if instant is None else instant.astimezone(UTC).isoformat().replace("+00:00", "Z")


def parse_duration(value: object) -> timedelta:
    """Return a duration between zero and LONGEST. Raises ValueError, whose text says which forms are expected."""
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


def elapsed_seconds() -> float:
    """Return the seconds on a clock that is never set and that goes on while the machine is suspended.

    Linux's monotonic clock stops then. The age of leases and heartbeats is measured by this one.
    """
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


def sender_now(date: str | None, here: datetime) -> datetime:
    """Return the time by the sender's clock, from its Date header (RFC 9110, section 6.6.1); else `here`.

    What the sender says of time counts from there, however wrong this machine's clock is.
    """
    return _http_date(date or "") or here


def retry_after_seconds(value: str | None, now: datetime, most: float) -> float | None:
    """Read a Retry-After header (RFC 9110, section 10.2.3: seconds or a date), at most `most` seconds.

    A date counts from `now`. Returns None where there is no header, or it is neither.
    """
    value = (value or "").strip()
    if _RETRY_AFTER_SECONDS.fullmatch(value):
        return min(float(value), most)
    date = _http_date(value)
    return min(max(0.0, (date - now).total_seconds()), most) if date else None


def _http_date(value: str) -> datetime | None:
    try:
        date = parsedate_to_datetime(value)
        return (date if date.tzinfo else date.replace(tzinfo=UTC)).astimezone(UTC)
    except (ValueError, OverflowError, IndexError, TypeError):
        return None
