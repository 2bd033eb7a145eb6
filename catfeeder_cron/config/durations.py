"""Types for the durations of the configuration: 1800 (seconds), "90s", "30m", "12h", "30d"."""

from datetime import timedelta
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator

from catfeeder_cron.times import LONGEST, format_duration, parse_duration


def within(shortest: timedelta = timedelta(0), longest: timedelta = LONGEST) -> AfterValidator:
    """Return a validator that a duration lies between the two: `Annotated[Duration, within(...)]`."""

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
"""The range that PostgreSQL accepts: whole milliseconds in 31 bits; 0 is excluded, as it means no timeout."""
