"""From a schedule to a run: which slot of a job is due, who gets it, and what becomes of those that went by."""

from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from threading import Lock

from catfeeder_cron.errors import DatabaseUnavailable
from catfeeder_cron.ledger import STILL_RUNNING, Ledger, Trigger
from catfeeder_cron.presence import Presence
from catfeeder_cron.schedule import MICROSECOND, Schedule


@dataclass
class Dispatch:
    """The slots of one job, as this process sees them."""

    job_id: str
    schedule: Schedule
    jitter: timedelta
    catch_up: bool
    shared: bool
    ledger: Ledger
    presence: Presence
    _looked_until: datetime = field(default_factory=lambda: datetime.now(UTC))
    _lock: Lock = field(default_factory=Lock)

    def claim_due(self) -> int | None:
        """Claim the latest slot that came up since the last call; return the id of the run that follows, if any."""
        now = datetime.now(UTC)
        with self._lock:
            slots = self.schedule.between(self._looked_until, now) if now > self._looked_until else None
            self._looked_until = now
        return self._claim(slots.last, "schedule") if slots else None

    def claim_overdue(self, accounted_until: datetime) -> int | None:
        """Claim the latest slot that nobody has accounted for; return the id of the run that follows, if any."""
        slots = self.schedule.between(accounted_until, datetime.now(UTC) - self.jitter)
        return self._claim(slots.last, "catch_up", run=self.catch_up) if slots else None

    def _claim(self, slot: datetime, trigger: Trigger, *, run: bool = True) -> int | None:
        described = self.schedule.describe()
        try:
            claim = self.ledger.claim(self.job_id, described, slot, trigger, shared=self.shared, run=run)
        except DatabaseUnavailable:
            self.presence.missed()
            raise
        self.presence.seen(datetime.now(UTC))
        if claim.advanced and claim.previous:
            last_accounted = self._account(claim.previous, slot if not run else slot - MICROSECOND)
            # Of a shared job every daemon has a part of the slot; one that is not done with its last is no gap.
            if run and claim.run_id is None and (claim.paused or not self.shared):
                slots = self.schedule.between(slot - MICROSECOND, slot)
                assert slots is not None
                self.ledger.miss(self.job_id, slots, last_accounted, claim.paused or STILL_RUNNING)
        return claim.run_id

    def _account(self, previous: datetime, until: datetime) -> datetime:
        """Record the slots in (`previous`, `until`] as missed, a stretch for each reason; return the last slot."""
        turns = [turn for turn in self.presence.turning_points() if previous < turn < until]
        for turn in [*turns, until]:
            slots = self.schedule.between(previous, turn)
            if slots:
                self.ledger.miss(self.job_id, slots, previous, self.presence.reason(slots.last))
                previous = slots.last
        return previous
