"""Parses expressions of crontab(5), and computes when they fire in a time zone.

The fields have their meaning in Vixie's cron: weekdays are counted from Sunday (0 and 7), a day of the
month and a weekday are alternatives unless one of them begins with `*`, and a step needs a range or a `*`
before it. This parser refuses all that cron's parser refuses (`5/15`, `sat-sun`, `L`, `?`, a sixth field).

Where local time jumps by at most three hours, as at the start and the end of daylight saving time (cron(8)):

- An expression whose minute or hour begins with `*` follows elapsed time: it fires at every minute whose
  wall clock matches: not in a skipped hour, and twice in a repeated one.
- Any other expression has fixed times of day. Those in a skipped hour become one, right after the gap; those in a
  repeated hour fire in its first pass only.

Every expression follows a longer jump (a country that crosses the date line) as a new clock.
"""

import re
from bisect import bisect_left, bisect_right
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from typing import NamedTuple, Self
from zoneinfo import ZoneInfo

MINUTE = timedelta(minutes=1)
DAY = timedelta(days=1)

LONGEST_DST_JUMP = timedelta(hours=3)
SHORTEST_STAY = timedelta(days=5)  # no zone has had one offset for less; the shortest on record is 6.96 days

NICKNAMES = {
    "@hourly": "0 * * * *",
    "@daily": "0 0 * * *",
    "@midnight": "0 0 * * *",
    "@weekly": "0 0 * * 0",
    "@monthly": "0 0 1 * *",
    "@yearly": "0 0 1 1 *",
    "@annually": "0 0 1 1 *",
}

MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
WEEKDAYS = ("sun", "mon", "tue", "wed", "thu", "fri", "sat")
DAYS_IN_MONTH = (31, 29, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)

_ITEM = re.compile(r"(?:\*|(?P<first>[0-9]+|[a-z]+)(?:-(?P<last>[0-9]+|[a-z]+))?)(?:/(?P<step>[0-9]+))?")


class _Field(NamedTuple):
    title: str
    low: int
    high: int
    names: tuple[str, ...] = ()

    def values(self, text: str) -> set[int]:
        """Return the numbers that a field's text stands for."""
        return {value for item in text.split(",") for value in self._item(item)}

    def _item(self, item: str) -> range:
        match = _ITEM.fullmatch(item.lower())
        if match is None:
            raise self._fault(item, self._grammar())
        first, last, step = match.group("first", "last", "step")
        if first and step and not last:
            raise self._fault(item, f"a range before the step, as in {first}-{self.high}/{step}")
        if step and int(step) == 0:
            raise self._fault(item, "a step of at least 1")
        low = self._number(first, item) if first else self.low
        high = self._number(last, item) if last else low if first else self.high
        if high < low:
            sunday = " (Sunday ends a range as 7, as in 5-7)" if self.names == WEEKDAYS and high == 0 else ""
            raise self._fault(item, f"a range that goes upwards{sunday}")
        return range(low, high + 1, int(step or 1))

    def _number(self, text: str, item: str) -> int:
        if text in self.names:
            return self.low + self.names.index(text)
        if text.isdigit() and self.low <= int(text) <= self.high:
            return int(text)
        raise self._fault(item, self._grammar())

    def _grammar(self) -> str:
        names = f" (or {self.names[0]} to {self.names[-1]})" if self.names else ""
        return f"*, {self.low} to {self.high}{names}, a range a-b, steps */n or a-b/n, or a list of these"

    def _fault(self, found: str, expected: str) -> ValueError:
        return ValueError(f"the {self.title} field has {found!r}, expected {expected}")


_FIELDS = (
    _Field("minute", 0, 59),
    _Field("hour", 0, 23),
    _Field("day-of-month", 1, 31),
    _Field("month", 1, 12, MONTHS),
    _Field("weekday", 0, 7, WEEKDAYS),
)


@dataclass(frozen=True)
class Crontab:
    """A parsed expression. `expression` is its text, with single spaces."""

    expression: str
    _times: tuple[int, ...] = field(repr=False)  # minutes of the day, ascending
    _days: frozenset[int] = field(repr=False)
    _months: frozenset[int] = field(repr=False)
    _weekdays: frozenset[int] = field(repr=False)  # 0 is Sunday
    _either_day: bool = field(repr=False)
    _follows_elapsed_time: bool = field(repr=False)

    @classmethod
    def parse(cls, expression: str) -> Self:
        """Read five fields or a nickname such as `@daily`.

        Raises ValueError with one line (the field, what it has, what is expected), also for an expression
        that no date can match.
        """
        texts = expression.split()
        if len(texts) == 1 and texts[0] in NICKNAMES:
            fields = NICKNAMES[texts[0]].split()
        elif expression.lstrip().startswith("@"):
            reason = ", which is no time of day" if texts[0] == "@reboot" else ""
            raise ValueError(f"found {expression.strip()!r}{reason}; expected one of {', '.join(NICKNAMES)}")
        elif len(texts) == len(_FIELDS):
            fields = texts
        else:
            titles = ", ".join(kind.title for kind in _FIELDS)
            raise ValueError(f"found {expression!r}, expected five fields ({titles}) or a nickname like @daily")

        minutes, hours, days, months, weekdays = map(_Field.values, _FIELDS, fields)
        stars = [text.startswith("*") for text in fields]
        either_day = not (stars[2] or stars[4])
        if not either_day and min(days) > max(DAYS_IN_MONTH[month - 1] for month in months):
            raise ValueError(
                f"the day-of-month field has {fields[2]!r}, expected a day that exists in the months "
                f"{fields[3]!r}: no date ever matches"
            )
        return cls(
            expression=" ".join(texts),
            _times=tuple(hour * 60 + minute for hour in sorted(hours) for minute in sorted(minutes)),
            _days=frozenset(days),
            _months=frozenset(months),
            _weekdays=frozenset(day % 7 for day in weekdays),
            _either_day=either_day,
            _follows_elapsed_time=stars[0] or stars[1],
        )

    def next_after(self, instant: datetime, zone: ZoneInfo) -> datetime:
        """Return the first firing strictly after `instant` (aware), in UTC.

        Raises OverflowError or ValueError where there is none before the year 10000.
        """
        earliest = _whole_minute(instant) + MINUTE
        start = earliest - LONGEST_DST_JUMP  # a jump before `earliest` may still matter
        offset = _offset(start, zone)
        opens = start + offset  # the wall clock from which on this offset's matches count
        while True:
            wall = self._first_match(max(opens, earliest + offset))
            change = _offset_change(start, wall - offset, zone)
            if change is None:
                return (wall - offset).replace(tzinfo=UTC)
            new = _offset(change, zone)
            opens = change + new
            if not self._follows_elapsed_time and abs(new - offset) <= LONGEST_DST_JUMP:
                in_gap = new > offset and self._first_match(change + offset) < opens
                if in_gap and change >= earliest:
                    return change.replace(tzinfo=UTC)
                opens = max(opens, change + offset)
            start, offset = change, new

    def count(self, after: datetime, until: datetime, zone: ZoneInfo) -> int:
        """Return how often it fires in (`after`, `until`]. It takes a few microseconds per day between them."""
        total = 0
        start, end = _whole_minute(after), _whole_minute(until)
        while start < end:
            stop = min(start + DAY, end)
            steady = _offset_change(start - LONGEST_DST_JUMP, stop, zone) is None
            if steady and stop - start == DAY:
                total += self._matches_within_a_day_after(start + _offset(start, zone))
            else:
                slot = self.next_after(start.replace(tzinfo=UTC), zone)
                while slot.replace(tzinfo=None) <= stop:
                    total += 1
                    slot = self.next_after(slot, zone)
            start = stop
        return total

    def _matches_within_a_day_after(self, wall: datetime) -> int:
        earlier = bisect_right(self._times, wall.hour * 60 + wall.minute)
        today, tomorrow = self._has_date(wall.date()), self._has_date(wall.date() + DAY)
        return (len(self._times) - earlier) * today + earlier * tomorrow

    def _first_match(self, wall: datetime) -> datetime:
        """Return the first wall clock time from `wall` on that the fields match, whatever the zone."""
        day = wall.date()
        if self._has_date(day):
            index = bisect_left(self._times, wall.hour * 60 + wall.minute)
            if index < len(self._times):
                return _at(day, self._times[index])
        day += DAY
        while not self._has_date(day):
            if day.month in self._months:
                day += DAY
            else:
                day = date(day.year + day.month // 12, day.month % 12 + 1, 1)
        return _at(day, self._times[0])

    def _has_date(self, day: date) -> bool:
        if day.month not in self._months:
            return False
        by_day, by_weekday = day.day in self._days, day.isoweekday() % 7 in self._weekdays
        return by_day or by_weekday if self._either_day else by_day and by_weekday


def _offset_change(after: datetime, until: datetime, zone: ZoneInfo) -> datetime | None:
    """Return the first minute in (`after`, `until`] with another UTC offset than `after`; all naive UTC."""
    offset = _offset(after, zone)
    while after < until:
        probe = min(after + SHORTEST_STAY, until)
        if _offset(probe, zone) != offset:
            while probe - after > MINUTE:
                middle = after + (probe - after) // MINUTE // 2 * MINUTE
                if _offset(middle, zone) == offset:
                    after = middle
                else:
                    probe = middle
            return probe
        after = probe
    return None


def _offset(instant: datetime, zone: ZoneInfo) -> timedelta:
    return zone.fromutc(instant.replace(tzinfo=zone)).replace(tzinfo=None) - instant


def _whole_minute(instant: datetime) -> datetime:
    return instant.astimezone(UTC).replace(second=0, microsecond=0, tzinfo=None)


def _at(day: date, minute: int) -> datetime:
    return datetime(day.year, day.month, day.day, *divmod(minute, 60))
