"""Computes when a job is due: its slots are equal in every process on every machine.

A slot is an instant in UTC that follows from the configuration alone, from neither a start time nor a previous run, so
any number of daemons agree on the slots without communication.
"""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cached_property
from hashlib import sha256
from itertools import pairwise
from typing import Protocol
from zoneinfo import ZoneInfo

from catfeeder_cron.schedule.crontab import Crontab
from catfeeder_cron.times import format_duration

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
MICROSECOND = timedelta(microseconds=1)
_WEEK = timedelta(days=7)


@dataclass(frozen=True)
class Slots:
    """The first, the last and the number of consecutive slots."""

    first: datetime
    last: datetime
    count: int


class Schedule(Protocol):
    """All slots of one job. Arguments must be aware datetimes; results are in UTC."""

    def next_after(self, instant: datetime) -> datetime | None:
        """Return the first slot strictly after `instant`; None when no slot is left."""

    def between(self, after: datetime, until: datetime) -> Slots | None:
        """Sum up the slots in (`after`, `until`] without listing them; None when there is none."""

    def describe(self) -> str:
        """Return the schedule in the words of the configuration."""


@dataclass(frozen=True)
class IntervalSchedule:
    """Slots on a fixed grid: whole intervals since the Unix epoch, shifted by a hash of the job's id.

    The shift keeps jobs of one interval from starting together.
    """

    interval: timedelta
    job_id: str

    @cached_property
    def _shift(self) -> int:
        return stable_hash(self.job_id) % (self.interval // MICROSECOND)

    def next_after(self, instant: datetime) -> datetime:
        """Do as Schedule.next_after."""
        return self._slot(self._index(instant) + 1)

    def between(self, after: datetime, until: datetime) -> Slots | None:
        """Do as Schedule.between."""
        before, last = self._index(after), self._index(until)
        if last <= before:
            return None
        return Slots(self._slot(before + 1), self._slot(last), last - before)

    def describe(self) -> str:
        """Do as Schedule.describe."""
        return f"every {format_duration(self.interval)}"

    def _index(self, instant: datetime) -> int:
        """Return the number of the last slot at or before `instant`."""
        return ((instant - EPOCH) // MICROSECOND - self._shift) // (self.interval // MICROSECOND)

    def _slot(self, index: int) -> datetime:
        return EPOCH + self._shift * MICROSECOND + index * self.interval


@dataclass(frozen=True)
class CronSchedule:
    """The times that a cron expression matches on the clocks of a zone."""

    crontab: Crontab
    zone: ZoneInfo

    def next_after(self, instant: datetime) -> datetime:
        """Do as Schedule.next_after."""
        return self.crontab.next_after(instant, self.zone)

    def between(self, after: datetime, until: datetime) -> Slots | None:
        """Do as Schedule.between."""
        first = self.next_after(after)
        if first > until:
            return None
        return Slots(first, self._last_before(until), self.crontab.count(after, until, self.zone))

    def describe(self) -> str:
        """Do as Schedule.describe."""
        return f"cron {self.crontab.expression} ({self.zone.key})"

    def _last_before(self, until: datetime) -> datetime:
        """Return the last slot at or before `until`; there must be one.

        It searches the last hour, then twice as far back each time, so that it passes few slots of any expression.
        """
        span = timedelta(hours=1)
        while (slot := self.next_after(until.astimezone(UTC) - span)) > until:
            span *= 2
        while (following := self.next_after(slot)) <= until:
            slot = following
        return slot


@dataclass(frozen=True)
class DateSchedule:
    """One slot at a fixed instant."""

    instant: datetime

    def next_after(self, instant: datetime) -> datetime | None:
        """Do as Schedule.next_after."""
        return self.instant if instant < self.instant else None

    def between(self, after: datetime, until: datetime) -> Slots | None:
        """Do as Schedule.between."""
        return Slots(self.instant, self.instant, 1) if after < self.instant <= until else None

    def describe(self) -> str:
        """Do as Schedule.describe."""
        return f"once at {self.instant.isoformat().removesuffix('+00:00')}Z"


def longest_gap(schedule: Schedule, after: datetime) -> timedelta | None:
    """Return the longest time between two consecutive slots, from the first two and those of the week from `after` on.

    None for a schedule that has one slot or none.
    """
    if isinstance(schedule, IntervalSchedule):
        return schedule.interval
    slots = [schedule.next_after(after)]
    while slots[-1] and (len(slots) == 1 or slots[-1] < after + _WEEK):
        slots.append(schedule.next_after(slots[-1]))
    return max((following - slot for slot, following in pairwise(slots) if slot and following), default=None)


def stable_hash(text: str) -> int:
    """Return a number of 64 bits that is equal in every process for equal texts."""
    return int.from_bytes(sha256(text.encode()).digest()[:8])
