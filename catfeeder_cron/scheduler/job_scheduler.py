"""The enabled jobs on a BackgroundTasks: at their slots, when these went by unseen, and when something is due between.

The account of a job's slots (slots.py) is opened when the database has been found, and looked at again whenever
that was away, or this process was.
"""

import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from functools import partial

from catfeeder_cron.config import Settings
from catfeeder_cron.database import Database
from catfeeder_cron.errors import (
    CatfeederCronError,
    DatabaseUnavailable,
    JobInterrupted,
    PermissionDenied,
    SchemaProblem,
    UndefinedObject,
    UnknownJob,
)
from catfeeder_cron.ledger import STILL_RUNNING, Ledger, Trigger
from catfeeder_cron.logs import get_logger
from catfeeder_cron.report import JobReport
from catfeeder_cron.schedule import Schedule
from catfeeder_cron.scheduler.background_tasks import BackgroundTasks
from catfeeder_cron.scheduler.downtime import Downtime
from catfeeder_cron.scheduler.executor import Executor
from catfeeder_cron.scheduler.listeners import Run, RunListener
from catfeeder_cron.scheduler.slots import JobSlots
from catfeeder_cron.scheduler.triggers import ScheduleTrigger
from catfeeder_cron.scheduler.waker import Waker

log = get_logger("catfeeder_cron.scheduler")

_COMING_UP = timedelta(seconds=5)


class JobScheduler(RunListener):
    """All methods may be called from any thread. The lock is never held while the database is asked."""

    def __init__(
        self, tasks: BackgroundTasks, executor: Executor, database: Database, ledger: Ledger, downtime: Downtime
    ) -> None:
        self._tasks = tasks
        self._executor = executor
        self._database = database
        self._ledger = ledger
        self._downtime = downtime
        self._slots: dict[str, JobSlots] = {}
        self._returns_seen = 0
        self._wakers: dict[str, Waker] = {}
        self._closed = False
        self._lock = threading.RLock()

    @property
    def schedules(self) -> dict[str, Schedule]:
        """The schedules of the jobs that are on it, by their ids."""
        with self._lock:
            return {job_id: slots.schedule for job_id, slots in self._slots.items()}

    def schedule_all(self) -> bool:
        """Put every enabled job on it, in place of what an earlier call put there.

        Returns False, with the reason logged, where one could not be.
        """
        with self._lock:
            jobs = self._executor.settings.jobs
            self._slots = {job_id: self._slots_of(job_id) for job_id, job in jobs.items() if job.enabled}
            added = [self._add(slots) for slots in self._slots.values()]
            self._listen()
        return all(added)

    def reload(self, settings: Settings) -> None:
        """Put another configuration in force: jobs come, go and move. One whose slots stay the same keeps its account.

        Raises a DatabaseError where the accounts could not be changed; the next heartbeat opens the new ones.
        """
        with self._lock:
            before = self._executor.settings
            self._executor.take_over(settings)
            gone = [job for job in self._slots if job not in settings.jobs or not settings.jobs[job].enabled]
            for job_id in gone:
                del self._slots[job_id]
                self._remove(job_id)
            changed = {
                job_id: self._slots_of(job_id)
                for job_id, job in settings.jobs.items()
                if job.enabled and (job_id not in self._slots or _grid(before, job_id) != _grid(settings, job_id))
            }
            self._slots |= changed
            for job_id, slots in changed.items():
                self._remove(job_id)
                self._add(slots)
        with suppress(DatabaseUnavailable):  # told by the database itself; made up for when it is back
            # The others' slots are theirs to claim: one that comes up at this moment is not overdue.
            self._open_accounts(changed, gone)

    def beat(self, reached: bool, /) -> None:
        """Open the accounts at the first heartbeat and after each return, and catch up on what is overdue."""
        if not reached:
            return
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
            self._run_soon(self._recover, job_id, _recovery_id(job_id))
        self._returns_seen = returns

    def ended(self, run: Run, report: JobReport, /) -> None:
        """Take note of a run that has ended, whoever began it: what it left may be due before the next slot."""
        if run.job_id in self._wakers:
            self._wakers[run.job_id].run_ended(fruitful=any(report.counts.values()))

    def stuck(self, _run: Run, /) -> None:
        """Have another worker in place of the one that the run does not give back."""
        self._tasks.replace_worker()

    def retry(self, job_id: str, retry_in: timedelta, /) -> None:
        """Try to make a run of the job again, so soon; whichever process is first makes it."""
        with self._lock:
            if job_id in self._slots and not self._executor.stopping:
                at = datetime.now(UTC) + retry_in
                self._run_soon(self._run_retry, job_id, _retry_id(job_id), at=at)

    def close(self) -> None:
        """Take off all that is on it, and wake no job any more. Idempotent."""
        with self._lock:  # a heartbeat or a waker that is at work at this moment puts nothing on any more
            self._closed = True
            wakers = list(self._wakers.values())
        for waker in wakers:
            waker.close()
        self._tasks.remove_tasks_of(self)

    def _slots_of(self, job_id: str) -> JobSlots:
        job, settings = self._executor.find(job_id)
        schedule = self._executor.settings.schedule(job_id)
        trigger = ScheduleTrigger(schedule, job_id, settings.jitter)
        return JobSlots(job_id, schedule, trigger, job.shared, self._ledger, self._downtime)

    def _add(self, slots: JobSlots) -> bool:
        job_id = slots.job_id
        if self._closed:
            return False
        if slots.schedule.next_after(datetime.now(UTC)) is None:
            log.info("job_has_no_slot_ahead", job=job_id, trigger=slots.schedule.describe())
            return True
        added = self._tasks.safe_add_task(
            self._run_due,
            args=[job_id, "schedule"],
            trigger=slots.trigger,
            id=job_id,
            name=self._executor.find(job_id)[0].summary,
            replace_existing=True,
            # One runs, one finds out that it is still running; more would only pile up.
            max_instances=2,
        )
        return not isinstance(added, int)

    def _remove(self, job_id: str) -> None:
        """Nothing is there to be taken off when a date's only slot is over."""
        further = (make_id(job_id) for make_id in (_catch_up_id, _woken_id, _recovery_id, _retry_id))
        self._tasks.remove_tasks_of(self, job_id, *further)

    def _run_soon(
        self,
        func: Callable[..., None],
        job_id: str,
        task_id: str,
        *args: object,
        at: datetime | None = None,
        at_once: int = 1,
    ) -> None:
        """Have a worker call `func`: now, or `at` a time. It takes the place of a call of this id that is to come."""
        with self._lock:
            if not self._closed:
                self._tasks.safe_add_task(
                    func,
                    args=[job_id, *args],
                    trigger="date",
                    run_date=at,
                    id=task_id,
                    replace_existing=True,
                    max_instances=at_once,
                )

    def _run_due(self, job_id: str, trigger: Trigger) -> None:
        """Run a job if this process gets its slot. Called in a worker thread whenever a slot comes up."""
        with self._lock:
            slots = self._slots.get(job_id)
        if slots is None:
            return  # a reload has taken it off the schedule
        begun = datetime.now(UTC)
        report = self._run(job_id, lambda: slots.claim(trigger), slots.due())
        if report is None:
            return
        interval = slots.interval(begun)
        if interval and report.duration > interval / 2:
            log.warning(
                "job_slow",
                job=job_id,
                run_id=report.run_id,
                duration_seconds=round(report.duration.total_seconds(), 3),
                interval_seconds=interval.total_seconds(),
            )
        # What came up meanwhile and found no free worker, unless a reload has opened another account.
        try:
            if self._slots.get(job_id) is slots:
                slots.pass_over(STILL_RUNNING, until=report.started_at + report.duration)
        except DatabaseUnavailable:
            pass  # told by the database itself; accounted for when it is back
        except CatfeederCronError as error:
            log.error("slots_not_accounted_for", job=job_id, reason=str(error))

    def _run(self, job_id: str, claim: Callable[[], int | None], slot: datetime | None = None) -> JobReport | None:
        try:
            return self._executor.run(job_id, claim, slot=slot)
        except UnknownJob:
            return None  # a reload has removed it at this moment
        except (DatabaseUnavailable, JobInterrupted):
            return None  # told already; the slot is accounted for when the database, or a daemon, is back
        except CatfeederCronError as error:
            log.error("slot_not_claimed", job=job_id, reason=str(error))
            return None

    def _open_accounts(self, unopened: dict[str, JobSlots], gone: Iterable[str] = ()) -> None:
        """Learn how far the jobs' slots are accounted for, and catch up; close the accounts of those `gone`."""
        triggers = {job_id: slots.schedule.describe() for job_id, slots in unopened.items()}
        disabled = [job_id for job_id, job in self._executor.settings.jobs.items() if not job.enabled]
        for job_id, accounted_until in self._ledger.register(triggers, [*disabled, *gone]).items():
            unopened[job_id].accounted_until = accounted_until
            self._catch_up(unopened[job_id])

    def _catch_up(self, slots: JobSlots) -> None:
        job_id = slots.job_id
        with self._lock:
            if self._slots.get(job_id) is not slots:
                return  # a reload has put another in its place
            self._reschedule_after_clock_change(slots)
            if slots.due() is None:
                return
            if self._executor.settings.jobs[job_id].catch_up:
                self._run_soon(self._run_due, job_id, _catch_up_id(job_id), "catch_up", at_once=2)
                return
        # Not what has just come up: another daemon is about to run it.
        slots.pass_over(until=datetime.now(UTC) - _COMING_UP)

    def _reschedule_after_clock_change(self, slots: JobSlots) -> None:
        """Put a job on anew whose task would wait for a time that the system's clock showed before it was put back."""
        task = next((task for task in self._tasks.tasks if self._tasks.running and task.id == slots.job_id), None)
        soon = slots.trigger.get_next_fire_time(None, datetime.now(UTC))
        if task and soon and soon < task.next_run_time:
            self._add(slots)

    def _recover(self, job_id: str) -> None:
        try:
            job, _ = self._executor.find(job_id)
            if job.recover is not None:
                job.recover(self._executor.context(job_id))
        except DatabaseUnavailable:
            pass  # told by the database itself; called again when it is back
        except CatfeederCronError as error:
            log.error("job_not_recovered", job=job_id, reason=self._executor.explain(job_id, error))

    def _listen(self) -> None:
        """Have jobs run as soon as there is something to do for them."""
        for job_id in () if self._closed else self._slots:
            wake = self._executor.find(job_id)[0].wake
            if wake is not None and job_id not in self._wakers:
                due_in, run = partial(self._due_in, job_id), partial(self._wake, job_id)
                self._wakers[job_id] = Waker(job_id, self._database, wake.channel, due_in, run)
                self._wakers[job_id].start()

    def _due_in(self, job_id: str) -> float | None:
        wake = self._executor.find(job_id)[0].wake
        try:
            return wake.due_in(self._executor.context(job_id)) if wake else None
        except (UndefinedObject, PermissionDenied) as problem:
            raise SchemaProblem(self._executor.explain(job_id, problem)) from None

    def _wake(self, job_id: str) -> None:
        if not self._executor.stopping:
            self._run_soon(self._run_woken, job_id, _woken_id(job_id))

    def _run_retry(self, job_id: str) -> None:
        """Make a run again that failed, if this process is the one that gets it."""
        if job_id in self._slots:
            self._run(job_id, partial(self._ledger.claim_retry, job_id))

    def _run_woken(self, job_id: str) -> None:
        """Run a job between its slots, unless it is running here, or paused."""
        job, _ = self._executor.find(job_id)
        self._run(job_id, partial(self._ledger.claim_woken, job_id, shared=job.shared))


def _retry_id(job_id: str) -> str:
    return f"{job_id} (retrying)"


def _catch_up_id(job_id: str) -> str:
    return f"{job_id} (catching up)"


def _woken_id(job_id: str) -> str:
    return f"{job_id} (woken)"


def _recovery_id(job_id: str) -> str:
    return f"{job_id} (recovering)"


def _grid(settings: Settings, job_id: str) -> tuple[object, ...]:
    """What a job's slots follow from."""
    job = settings.jobs[job_id]
    return job.interval, job.cron, job.date, job.timezone, job.jitter, settings.scheduler.timezone
