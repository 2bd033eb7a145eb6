"""Claims the slots of a job that are due, and accounts for those that passed without a run."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from threading import Lock

from catfeeder_cron.errors import DatabaseUnavailable
from catfeeder_cron.ledger import WENT_BACK, Ledger, Missed, Trigger
from catfeeder_cron.schedule import MICROSECOND, Schedule
from catfeeder_cron.scheduler.downtime import Downtime
from catfeeder_cron.scheduler.triggers import ScheduleTrigger


def _now() -> datetime:
    return datetime.now(UTC)


@dataclass
class JobSlots:
    """The slots of one job, as this process sees them. All methods may be called from any thread."""

    job_id: str
    schedule: Schedule
    trigger: ScheduleTrigger
    shared: bool
    ledger: Ledger
    downtime: Downtime
    accounted_until: datetime | None = None
    """Until when the job's slots are accounted for, as far as this process knows; None before it has asked."""
    clock: Callable[[], datetime] = _now
    """The database's clock."""
    _wait_seconds: float | None = None
    _claimed: deque[datetime] = field(default_factory=lambda: deque(maxlen=1000))
    # Held by a worker, or by the thread that follows a heartbeat up, while it claims or accounts for slots, the
    # database's answer included: two threads of this process would otherwise claim from the same account, and one of
    # them in vain.
    _lock: Lock = field(default_factory=Lock)

    def due(self, now: datetime | None = None) -> datetime | None:
        """Return the latest slot whose time has come and that is not accounted for, as far as this process knows."""
        if self.accounted_until is None:
            return None
        now = now or self.clock()
        slots = self.schedule.between(self.accounted_until, now)
        if slots and self.trigger.fire_time(slots.last) > now:
            slots = self.schedule.between(self.accounted_until, slots.last - MICROSECOND)
        return slots.last if slots else None

    def claim(self, trigger: Trigger) -> int | None:
        """Claim the slot that is due; return the id of the run, or None if this process does not get one."""
        return self._settle(trigger, run=True)

    def must_wait(self) -> float | None:
        """Return in how many seconds the slot may be claimed that could not be because the database went back; once."""
        with self._lock:
            seconds, self._wait_seconds = self._wait_seconds, None
        return seconds

    def pass_over(self, reason: str | None = None, until: datetime | None = None) -> None:
        """Account for all slots that were due at `until` (default: now) as missed, for `reason`.

        Without a reason, each is missed for the one that Downtime gives for its time.
        """
        self._settle("schedule", run=False, reason=reason, until=until)

    def open(self, accounted_until: datetime) -> None:
        """Take in until when the ledger has the slots accounted for.

        Where the ledger lost its last seconds, this process knows better: its slots are not run again. An account in
        the future, which a wrong clock left behind, counts for nothing.
        """
        with self._lock:
            known = self.accounted_until
            if known and accounted_until < known <= self.clock():
                self._make_up_for(accounted_until, known)
            else:
                self.accounted_until = accounted_until

    def interval(self, instant: datetime) -> timedelta | None:
        """Return the time between the two slots after `instant`; None if there are no two."""
        first = self.schedule.next_after(instant)
        second = self.schedule.next_after(first) if first else None
        return second - first if first and second else None

    def _settle(
        self, trigger: Trigger, *, run: bool, reason: str | None = None, until: datetime | None = None
    ) -> int | None:
        with self._lock:
            # Repeated each time that another process has moved the account on since this one looked.
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
                if claim.accounted_until < known <= self.clock():
                    self._make_up_for(claim.accounted_until, known)
                    continue
                self.accounted_until = claim.accounted_until
                if claim.accounted_until >= slot:
                    if claim.run_id is not None:
                        self._claimed.append(slot)
                    return claim.run_id
                if claim.wait_seconds is not None:
                    self._wait_seconds = claim.wait_seconds
                    may_begin_at = self.clock() + timedelta(seconds=claim.wait_seconds)
                    self.downtime.held(slot - MICROSECOND, may_begin_at)
                    return None
                if claim.too_early:
                    return None  # the server's clock was set back; the next heartbeat tells by how much
            return None

    def _make_up_for(self, after: datetime, until: datetime) -> None:
        """Account anew for the slots in (`after`, `until`], whose account the ledger has lost. Called under the lock.

        The runs that this process made are recorded again by the supervisor, so they are in no stretch.
        """
        described = self.schedule.describe()
        while after < until:
            missed, start = list[Missed](), after
            for slot in [*(slot for slot in self._claimed if after < slot <= until), until + MICROSECOND]:
                if slots := self.schedule.between(start, slot - MICROSECOND):
                    missed.append(Missed(slots, WENT_BACK))
                start = slot
            grows = bool(missed) and missed[0].slots.first == self.schedule.next_after(after)
            claim = self.ledger.claim(
                self.job_id, described, after, until, missed, None, shared=self.shared, grows=grows
            )
            if claim.accounted_until <= after:
                break  # the job was disabled meanwhile: it has no account
            after = claim.accounted_until  # another process may have done a part of it
        self.accounted_until = after

    def _missed(self, after: datetime, until: datetime, reason: str | None) -> list[Missed]:
        """Return the slots in (`after`, `until`] as stretches, one for each reason."""
        stretches: list[Missed] = []
        for turn, known_reason in [(until, reason)] if reason else self.downtime.reasons(until):
            slots = self.schedule.between(after, min(turn, until))
            if slots:
                stretches.append(Missed(slots, known_reason))
                after = slots.last
        return stretches
