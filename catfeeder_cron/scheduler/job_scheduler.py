"""Runs the enabled jobs: at their slots, after slots that were missed, and again after a failure.

A slot goes one way: JobScheduler, JobSlots, Ledger, Executor, Supervisor, the job, the listeners. The account of a
job's slots (slots.py) is opened at the first contact with the database, and read again after each outage of the
database or of this process.
"""

import threading
from collections.abc import Iterable, Mapping
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

from catfeeder_cron.config import Settings
from catfeeder_cron.errors import CatfeederCronError, DatabaseUnavailable
from catfeeder_cron.job import Job
from catfeeder_cron.ledger import STILL_RUNNING, Ledger, Trigger
from catfeeder_cron.logs import get_logger
from catfeeder_cron.report import JobReport
from catfeeder_cron.schedule import Schedule
from catfeeder_cron.scheduler.downtime import Downtime
from catfeeder_cron.scheduler.executor import Executor
from catfeeder_cron.scheduler.job_tasks import JobTasks
from catfeeder_cron.scheduler.listeners import RunListener
from catfeeder_cron.scheduler.server_clock import ClockWatch, ServerClock
from catfeeder_cron.scheduler.slots import JobSlots
from catfeeder_cron.scheduler.triggers import ScheduleTrigger

log = get_logger("catfeeder_cron.scheduler")

# A slot that has just come up is not overdue: another daemon is about to run it.
_NOT_OVERDUE_YET = timedelta(seconds=5)
# A task that waited by this machine's clock may come this much too early by the database's.
_NEARLY = timedelta(seconds=0.15)
# A task that comes earlier than that, because a clock was set, comes again at its slot if that is so near.
_SOON = timedelta(seconds=2)


class JobScheduler(RunListener):
    """All methods may be called from any thread."""

    def __init__(
        self, tasks: JobTasks, executor: Executor, ledger: Ledger, downtime: Downtime, clock: ServerClock
    ) -> None:
        self._tasks = tasks
        self._clock = clock
        self._clock_watch = ClockWatch(clock)
        self._executor = executor
        self._ledger = ledger
        self._downtime = downtime
        self._slots: dict[str, JobSlots] = {}
        self._returns_seen = 0
        # Held while the scheduled jobs are read or change: by the caller of `schedule_all` or `reload`, by the
        # heartbeat's thread, and by workers. Never held while the database is asked. Its holder may take it again: a
        # signal's handler may come in at any point.
        self._lock = threading.RLock()
        # Held by the thread of a heartbeat while it opens accounts: of two heartbeats at the same time one opens them,
        # and asks for recovery once.
        self._opening = threading.RLock()

    @property
    def schedules(self) -> dict[str, Schedule]:
        """The schedules of the scheduled jobs, by their ids."""
        with self._lock:
            return {job_id: slots.schedule for job_id, slots in self._slots.items()}

    def schedule_all(self) -> bool:
        """Schedule every enabled job, in place of those that an earlier call scheduled.

        Returns False, with the reason logged, where one could not be.
        """
        with self._lock:
            jobs = self._executor.settings.jobs
            self._slots = {job_id: self._slots_of(job_id) for job_id, job in jobs.items() if job.enabled}
            added = [self._add(slots) for slots in self._slots.values()]
        return all(added)

    def reload(self, settings: Settings, jobs: Mapping[str, Job[Any]]) -> None:
        """Put another configuration in force: jobs come, go and move. A job whose slots don't change keeps its account.

        Raises a DatabaseError where the accounts could not be changed; the next heartbeat opens the new ones.
        """
        with self._lock:
            before = self._executor.settings
            self._executor.take_over(settings, jobs)
            gone = [job for job in self._slots if job not in settings.jobs or not settings.jobs[job].enabled]
            for job_id in gone:
                del self._slots[job_id]
                self._tasks.remove(job_id)
            changed = {
                job_id: self._slots_of(job_id)
                for job_id, job in settings.jobs.items()
                if job.enabled and (job_id not in self._slots or _grid(before, job_id) != _grid(settings, job_id))
            }
            self._slots |= changed
            for job_id, slots in changed.items():
                self._tasks.remove(job_id)
                self._add(slots)
        with suppress(DatabaseUnavailable):  # the database has logged it; a heartbeat makes up for it later
            # Only of the changed jobs: a slot of another one that comes up at this moment is not overdue.
            self._open_accounts(changed, gone)

    def beat(self, reached: bool, /) -> None:
        """Open the accounts at the first heartbeat and after each return, and catch up on overdue slots.

        Where this machine's clock was set, have the tasks wait anew.
        """
        if self._clock_watch.was_set():
            with self._lock:
                for slots in self._slots.values():
                    self._add(slots)
        if reached:
            with self._opening:
                self._open_and_recover()

    def retry(self, job_id: str, retry_in: timedelta, /) -> None:
        """Try to retry a failed run, so soon; the first process that tries makes the run."""
        with self._lock:
            if job_id in self._slots and not self._executor.stopping:
                self._tasks.run_soon("retrying", self._run_retry, job_id, at=datetime.now(UTC) + retry_in)

    def _open_and_recover(self) -> None:
        with self._lock:
            returns = self._downtime.returns
            unopened = {
                job_id: slots
                for job_id, slots in self._slots.items()
                if returns != self._returns_seen or slots.accounted_until is None
            }
            recoverable = [job_id for job_id in unopened if self._executor.find(job_id)[0].recover is not None]
        if self._executor.stopping:
            return
        if unopened:
            self._open_accounts(unopened)
        for job_id in recoverable:
            self._tasks.run_soon("recovering", self._recover, job_id)
        self._returns_seen = returns

    def _slots_of(self, job_id: str) -> JobSlots:
        job, settings = self._executor.find(job_id)
        schedule = self._executor.settings.schedule(job_id)
        trigger = ScheduleTrigger(schedule, job_id, settings.jitter, self._clock)
        return JobSlots(
            job_id, schedule, trigger, job.shared, self._ledger, self._downtime, clock=partial(_nearly_now, self._clock)
        )

    def _add(self, slots: JobSlots) -> bool:
        if slots.schedule.next_after(self._clock.now()) is None:
            log.info("job_has_no_slot_ahead", job=slots.job_id, trigger=slots.schedule.describe())
            return True
        summary = self._executor.find(slots.job_id)[0].summary
        return self._tasks.add(slots.job_id, slots.trigger, summary, self._run_due, "schedule")

    def _run_due(self, job_id: str, trigger: Trigger, comes_again: bool = False) -> None:
        """Run a job if this process gets its slot. Called in a worker thread whenever a slot comes up, or once more."""
        with self._lock:
            slots = self._slots.get(job_id)
        if slots is None:
            return  # a reload has removed the job
        begun = self._clock.now()
        due = slots.due()
        if due is None and not comes_again:
            self._come_again(slots)
        report = self._executor.run_scheduled(job_id, partial(slots.claim, trigger), trigger, due)
        if report is None:
            if seconds := slots.must_wait():
                self._run_in(timedelta(seconds=seconds), job_id, trigger)
            return
        _warn_if_slow(report, slots.interval(begun))
        # Slots that came up meanwhile found no free worker. After a reload they belong to another account.
        try:
            if self._slots.get(job_id) is slots:
                ended = report.started_at + self._clock.correction() + report.duration
                slots.pass_over(STILL_RUNNING, until=ended)
        except DatabaseUnavailable:
            pass  # the database has logged it; they are accounted for when it is back
        except CatfeederCronError as error:
            log.error("slots_not_accounted_for", job=job_id, reason=str(error))

    def _come_again(self, slots: JobSlots) -> None:
        """Have the job's task come at its next slot, where it came a moment too early by the database's clock."""
        now = self._clock.now()
        following = slots.trigger.next_fire_time(now)
        if following and following - now < _SOON and slots.accounted_until is not None:
            self._run_in(following - now, slots.job_id, "schedule")

    def _run_in(self, delay: timedelta, job_id: str, trigger: Trigger) -> None:
        self._tasks.run_soon("coming again", self._run_due, job_id, trigger, True, at=datetime.now(UTC) + delay)

    def _run_retry(self, job_id: str) -> None:
        """Retry a failed run, if this process gets it. Called in a worker thread."""
        if job_id in self._slots:
            self._executor.run_scheduled(job_id, partial(self._ledger.claim_retry, job_id), "retry")

    def _open_accounts(self, unopened: dict[str, JobSlots], gone: Iterable[str] = ()) -> None:
        """Learn how far the jobs' slots are accounted for, and catch up; close the accounts of those `gone`."""
        triggers = {job_id: slots.schedule.describe() for job_id, slots in unopened.items()}
        disabled = [job_id for job_id, job in self._executor.settings.jobs.items() if not job.enabled]
        for job_id, accounted_until in self._ledger.register(triggers, [*disabled, *gone]).items():
            unopened[job_id].open(accounted_until)
            self._catch_up(unopened[job_id])

    def _catch_up(self, slots: JobSlots) -> None:
        job_id = slots.job_id
        with self._lock:
            if self._slots.get(job_id) is not slots:
                return  # a reload has replaced them
            if self._tasks.waits_too_long(job_id, slots.trigger):
                self._add(slots)
            if slots.due(self._clock.now()) is None:
                return  # a slot that is only nearly due has a task that comes for it
            if self._executor.settings.jobs[job_id].catch_up:
                self._tasks.run_soon("catching up", self._run_due, job_id, "catch_up", at_once=2)
                return
        slots.pass_over(until=self._clock.now() - _NOT_OVERDUE_YET)

    def _recover(self, job_id: str) -> None:
        """Have a job recover from an outage. Called in a worker thread."""
        try:
            job, _ = self._executor.find(job_id)
            if job.recover is not None:
                job.recover(self._executor.context(job_id))
        except DatabaseUnavailable:
            pass  # the database has logged it; this is called again when it is back
        except CatfeederCronError as error:
            log.error("job_not_recovered", job=job_id, reason=self._executor.explain(job_id, error))


def _nearly_now(clock: ServerClock) -> datetime:
    return clock.now() + _NEARLY


def _warn_if_slow(report: JobReport, interval: timedelta | None) -> None:
    """Warn of a run that took more than half of the time between two slots."""
    if interval and report.duration > interval / 2:
        log.warning(
            "job_slow",
            job=report.job,
            run_id=report.run_id,
            duration_seconds=round(report.duration.total_seconds(), 3),
            interval_seconds=interval.total_seconds(),
        )


def _grid(settings: Settings, job_id: str) -> tuple[object, ...]:
    """Return the settings that decide when a job's slots are."""
    job = settings.jobs[job_id]
    return job.interval, job.cron, job.date, job.timezone, job.jitter, settings.scheduler.timezone
