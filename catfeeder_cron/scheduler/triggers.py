"""Makes a job's schedule a trigger of APScheduler, with a jitter that is equal in every daemon."""

from datetime import UTC, datetime, timedelta

from apscheduler.triggers.base import BaseTrigger

from catfeeder_cron.schedule import MICROSECOND, Schedule, stable_hash
from catfeeder_cron.scheduler.server_clock import ServerClock


class ScheduleTrigger(BaseTrigger):  # type: ignore[misc]  # APScheduler has no annotations
    """A trigger that fires once for each slot, up to `jitter` after it but always before the next slot.

    The delay is a hash of the job's id and the slot: it needs no state, is equal in every daemon and never adds up.
    Slots are times of the database's clock; APScheduler asks and waits by this machine's.
    """

    def __init__(
        self, schedule: Schedule, job_id: str, jitter: timedelta = timedelta(0), clock: ServerClock | None = None
    ) -> None:
        self._schedule = schedule
        self._job_id = job_id
        self._jitter = jitter
        self._clock = clock or ServerClock()
        # The last answer by both clocks: asked for the time after it, the correction may have changed a little.
        self._answered: tuple[datetime, datetime] | None = None

    def get_next_fire_time(self, previous_fire_time: datetime | None, now: datetime) -> datetime | None:
        """Return the next fire time; after a `previous_fire_time`, the latest that is due, if any is.

        APScheduler asks again and again until the answer lies after `now`, to coalesce missed slots into
        one run. After a long sleep that would be every slot since; skipping to the latest makes it two steps.
        A trigger that starts afresh includes `now` itself.
        """
        correction = self._clock.correction()
        now = now.astimezone(UTC) + correction  # arithmetic in a zone would be done on its wall clock
        if previous_fire_time is None:
            fire_time = self._first_after(now - MICROSECOND)
        else:
            fire_time = self._first_after(self._by_server(previous_fire_time.astimezone(UTC), correction))
            if fire_time and fire_time <= now:
                fire_time = self._latest_between(fire_time, now)
        if fire_time is None:
            return None
        self._answered = fire_time - correction, fire_time
        return fire_time - correction

    def next_fire_time(self, instant: datetime) -> datetime | None:
        """Return when the trigger fires first after `instant`; both are times of the database's clock."""
        return self._first_after(instant)

    def fire_time(self, slot: datetime) -> datetime:
        """Return when the trigger fires for `slot`, by the database's clock."""
        limit = self._jitter
        if limit and (following := self._schedule.next_after(slot)):
            limit = min(limit, following - slot)
        if not limit:
            return slot
        return slot + stable_hash(f"{self._job_id} {slot.isoformat()}") % (limit // MICROSECOND) * MICROSECOND

    def _by_server(self, instant: datetime, correction: timedelta) -> datetime:
        answered = self._answered
        return answered[1] if answered and answered[0] == instant else instant + correction

    def _first_after(self, instant: datetime) -> datetime | None:
        slot = self._schedule.next_after(instant - self._jitter)
        while slot and (fire_time := self.fire_time(slot)) <= instant:
            slot = self._schedule.next_after(slot)
        return fire_time if slot else None

    def _latest_between(self, earliest: datetime, now: datetime) -> datetime:
        """Return the last fire time in [`earliest`, `now`], of which `earliest` is one."""
        until = now
        while slots := self._schedule.between(earliest, until):
            if (fire_time := self.fire_time(slots.last)) <= now:
                return fire_time
            until = slots.last - MICROSECOND
        return earliest

    def __str__(self) -> str:
        return self._schedule.describe()
