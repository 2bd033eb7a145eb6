"""From a schedule to a run: which slot of a job is due, who gets it, and what becomes of those that went by."""

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from threading import Lock

from catfeeder_cron.errors import CatfeederCronError, DatabaseUnavailable
from catfeeder_cron.ledger import Ledger, Missed, Trigger
from catfeeder_cron.schedule import MICROSECOND, Schedule
from catfeeder_cron.scheduler.downtime import Downtime
from catfeeder_cron.scheduler.triggers import ScheduleTrigger


def _now() -> datetime:
    return datetime.now(UTC)


@dataclass
class JobSlots:
    """The slots of one job, as this process sees them. Safe to use from any thread."""

    job_id: str
    schedule: Schedule
    trigger: ScheduleTrigger
    shared: bool
    ledger: Ledger
    downtime: Downtime
    accounted_until: datetime | None = None
    """Where the job's account stands, as far as this process knows; None before it has been opened."""
    clock: Callable[[], datetime] = _now
    _lock: Lock = field(default_factory=Lock)

    def due(self, now: datetime | None = None) -> datetime | None:
        """Return the latest slot whose time has come and that nobody has accounted for, as far as is known here."""
        if self.accounted_until is None:
            return None
        now = now or self.clock()
        slots = self.schedule.between(self.accounted_until, now)
        if slots and self.trigger.fire_time(slots.last) > now:
            slots = self.schedule.between(self.accounted_until, slots.last - MICROSECOND)
        return slots.last if slots else None

    def claim(self, trigger: Trigger) -> int | None:
        """Claim the slot that is due; return the id of the run that follows, if it is this process's."""
        return self._settle(trigger, run=True)

    def pass_over(self, reason: str | None = None, until: datetime | None = None) -> None:
        """Account for all slots that were due at `until` (default: now) without a run: for `reason`, or for what is
        known of their times.
        """
        self._settle("schedule", run=False, reason=reason, until=until)

    def interval(self, instant: datetime) -> timedelta | None:
        """Return how far apart the two slots after `instant` lie."""
        first = self.schedule.next_after(instant)
        second = self.schedule.next_after(first) if first else None
        return second - first if first and second else None

    def _settle(
        self, trigger: Trigger, *, run: bool, reason: str | None = None, until: datetime | None = None
    ) -> int | None:
        with self._lock:
            # Once more for each other process that has moved the account on since this one looked.
            while slot := self.due(until):
                known = self.accounted_until
                assert known is not None
                missed = self._missed(known, slot - MICROSECOND if run else slot, reason)
                described = self.schedule.describe()
                try:
                    claim = self.ledger.claim(
                        self.job_id, described, known, slot, missed, trigger if run else None, shared=self.shared
                    )
                except DatabaseUnavailable:
                    self.downtime.missed()
                    raise
                self.downtime.seen(self.clock())
                self.accounted_until = claim.accounted_until
                if claim.accounted_until >= slot:
                    return claim.run_id
                if claim.too_early:
                    raise CatfeederCronError(
                        "this machine's clock is more than an hour ahead of the database's; set one of them right"
                    )
            return None

    def _missed(self, after: datetime, until: datetime, reason: str | None) -> list[Missed]:
        """Sum up the slots in (`after`, `until`], a stretch for each reason."""
        stretches: list[Missed] = []
        for turn, known_reason in [(until, reason)] if reason else self.downtime.reasons(until):
            slots = self.schedule.between(after, min(turn, until))
            if slots:
                stretches.append(Missed(slots, known_reason))
                after = slots.last
        return stretches
