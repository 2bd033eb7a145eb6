"""Makes a job's schedule a trigger of APScheduler, with a jitter that is equal in every daemon."""

from datetime import UTC, datetime, timedelta

from apscheduler.triggers.base import BaseTrigger

from catfeeder_cron.schedule import MICROSECOND, Schedule, stable_hash


class ScheduleTrigger(BaseTrigger):  # type: ignore[misc]  # APScheduler has no annotations
    """A trigger that fires once for each slot, up to `jitter` after it but always before the next slot.

    The delay is a hash of the job's id and the slot: it needs no state, is equal in every daemon and never adds up.
    """

    def __init__(self, schedule: Schedule, job_id: str, jitter: timedelta = timedelta(0)) -> None:
        self._schedule = schedule
        self._job_id = job_id
        self._jitter = jitter

    def get_next_fire_time(self, previous_fire_time: datetime | None, now: datetime) -> datetime | None:
        """Return the next fire time; after a `previous_fire_time`, the latest that is due, if any is.

        APScheduler asks again and again until the answer lies after `now`, to coalesce missed slots into
        one run. After a long sleep that would be every slot since; skipping to the latest makes it two steps.
        A trigger that starts afresh includes `now` itself.
        """
        now = now.astimezone(UTC)  # arithmetic in a zone would be done on its wall clock
        if previous_fire_time is None:
            return self._first_after(now - MICROSECOND)
        following = self._first_after(previous_fire_time.astimezone(UTC))
        if following is None or following > now:
            return following
        return self._latest_between(following, now)

    def fire_time(self, slot: datetime) -> datetime:
        """Return when the trigger fires for `slot`."""
        limit = self._jitter
        if limit and (following := self._schedule.next_after(slot)):
            limit = min(limit, following - slot)
        if not limit:
            return slot
        return slot + stable_hash(f"{self._job_id} {slot.isoformat()}") % (limit // MICROSECOND) * MICROSECOND

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
