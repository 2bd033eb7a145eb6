"""The configured jobs: on a schedule, or one of them now."""

import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self, final

from catfeeder_cron import schema
from catfeeder_cron.background_tasks import BackgroundTasks
from catfeeder_cron.config import CustomJobSettings, JobSettings, Settings, load
from catfeeder_cron.custom_jobs import custom_job
from catfeeder_cron.database import Database
from catfeeder_cron.dispatch import Dispatch
from catfeeder_cron.errors import (
    CatfeederCronError,
    DatabaseError,
    DatabaseUnavailable,
    JobAborted,
    JobInterrupted,
    JobIsRunning,
    UnknownJob,
)
from catfeeder_cron.job import Job, JobContext, JobReport, Progress, no_progress
from catfeeder_cron.jobs import built_in
from catfeeder_cron.ledger import STILL_RUNNING, Ledger, Process, Trigger
from catfeeder_cron.logs import get_logger
from catfeeder_cron.oauth.client import OAuthClient
from catfeeder_cron.pings import Pings
from catfeeder_cron.presence import Presence
from catfeeder_cron.runner import run_job
from catfeeder_cron.schedule import Schedule, schedule_for
from catfeeder_cron.supervisor import Run, Supervisor
from catfeeder_cron.triggers import ScheduleTrigger
from catfeeder_cron.waker import Waker

log = get_logger(__name__)

_TRY_AGAIN_SECONDS = 0.5
_COMING_UP = timedelta(seconds=5)


@final
class Crons:
    """The jobs of a configuration.

    What is not handed in is opened from the configuration at its first use and closed by `close` (or by leaving a
    `with` block); what is handed in stays its owner's. `config` is a Settings object or the path of a file; by default
    the file is looked up as the command line does. `jobs` are those that there are, by default the built-in ones.
    `on_contact` is called once, when the database was first reached; `on_change` is told what Supervisor says.
    All methods may be called from any thread.

    `inject_crons` and the methods named after jobs return `success` or `error` and log the reason; the others raise.
    """

    def __init__(
        self,
        error: int = 84,
        success: int = 0,
        debug: bool = False,
        *,
        config: Settings | Path | str | None = None,
        database: Database | None = None,
        background_tasks: BackgroundTasks | None = None,
        oauth: OAuthClient | None = None,
        jobs: Mapping[str, Job[Any]] | None = None,
        on_contact: Callable[[], None] = lambda: None,
        on_change: Callable[[JobReport | None], None] = lambda _report: None,
    ) -> None:
        self._error = error
        self._success = success
        self._debug = debug
        self._jobs = built_in() if jobs is None else jobs
        self._config = config
        self._database = database
        self._tasks = background_tasks
        self._oauth = oauth
        self._on_contact = on_contact
        self._pings = Pings()
        self._on_change = on_change
        self._owned: list[Database | BackgroundTasks] = []
        self._lock = threading.RLock()
        self._process = Process("run-once")
        self._presence = Presence(datetime.now(UTC))
        self._ledger: Ledger | None = None
        self._supervisor: Supervisor | None = None
        self._dispatches: dict[str, Dispatch] = {}
        self._returns_seen = 0
        self._wakers: dict[str, Waker] = {}
        self._skipped: dict[str, str | None] = {}
        self._stop_requested = threading.Event()

    def __init_subclass__(cls) -> None:
        raise TypeError("Crons is final and can't be subclassed")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def inject_crons(self) -> int:
        """Put every enabled job on the schedule, in place of what an earlier call put there.

        A BackgroundTasks that this object opened is started too; one that was handed in is its owner's to start.
        """
        try:
            settings, tasks, ledger = self.settings, self._background_tasks(), self._open_ledger()
            enabled = [job_id for job_id, job in settings.jobs.items() if job.enabled]
            self._dispatches = {job_id: self._dispatch(job_id, ledger) for job_id in enabled}
        except CatfeederCronError as error:
            log.error("jobs_not_scheduled", reason=str(error))
            return self._error
        ledger.become_daemon()
        added = [self._put_on_schedule(tasks, dispatch) for dispatch in self._dispatches.values()]
        self._supervise().start()
        self._listen()
        started = tasks not in self._owned or tasks.safe_start() == 0
        return self._success if all(added) and started else self._error

    def reload(self, settings: Settings) -> None:
        """Go on with another configuration. Running jobs keep the settings that they began with.

        A job whose trigger stays the same keeps its slots. What can't be changed in a running process stays as it is.
        """
        with self._lock:
            before, self._config = self.settings, settings
            gone = [job for job in self._dispatches if job not in settings.jobs or not settings.jobs[job].enabled]
            for job_id in gone:
                del self._dispatches[job_id]
                self._take_off_schedule(job_id)
            changed = [
                job_id
                for job_id, job in settings.jobs.items()
                if job.enabled
                and (
                    job_id not in self._dispatches
                    or _slots(before.jobs[job_id]) != _slots(job)
                    or before.scheduler.timezone != settings.scheduler.timezone
                )
            ]
            dispatches = {job_id: self._dispatch(job_id, self._open_ledger()) for job_id in changed}
            self._dispatches |= dispatches
            for job_id, dispatch in dispatches.items():
                self._take_off_schedule(job_id)
                self._put_on_schedule(self._background_tasks(), dispatch)
        with suppress(DatabaseUnavailable):  # told by the database itself; made up for when it is back
            # The others' slots are theirs to claim: one that comes up at this moment is not overdue.
            self._open_accounts(dispatches, gone)

    def check_actions(self) -> int:
        """Run the due rows of "Actions" now."""
        return self._run_now("check-actions")

    def clean_expired_tokens(self) -> int:
        """Delete the expired rows of "Connections" now."""
        return self._run_now("clean-tokens")

    def clean_expired_verification_nodes(self) -> int:
        """Delete the expired rows of "Verification" now."""
        return self._run_now("clean-verification")

    def renew_oaths(self) -> int:
        """Renew the OAuth tokens that would expire before the next run now."""
        return self._run_now("renew-oauth")

    def _test_hello_world(self) -> int:
        return self._run_now("test-hello-world")

    def _test_current_date(self) -> int:
        return self._run_now("test-current-date")

    def run(
        self,
        job_id: str,
        *,
        dry_run: bool = False,
        wait: timedelta = timedelta(0),
        progress: Progress = no_progress,
    ) -> JobReport:
        """Run a job now in this thread, enabled or not, and return what is to be told of it.

        A dry run leaves no trace in the ledger. Raises UnknownJob, ConfigurationError, JobIsRunning where it still runs
        after `wait`, in whatever process, JobAborted after `request_stop`, and a DatabaseError where the ledger can't
        be reached.
        """
        job, settings = self.find(job_id)
        context = self._context(job_id, settings, progress)
        if dry_run:
            context.dry_run = True
            return run_job(job, context, settings)
        supervisor, ledger = self._supervise(), self._open_ledger()
        supervisor.beat()
        supervisor.start()
        patience = time.monotonic() + wait.total_seconds()
        while not (run := supervisor.begin(job_id, context, lambda: ledger.claim_manual(job_id, shared=job.shared))):
            if time.monotonic() >= patience:
                raise JobIsRunning(self._where_it_runs(job_id))
            self._stop_requested.wait(_TRY_AGAIN_SECONDS)
        return self._execute(run, job, settings)

    def find(self, job_id: str) -> tuple[Job[Any], JobSettings]:
        """Return a job and its settings. Raises UnknownJob, which names the nearest id."""
        settings = self.settings.require_job(job_id)
        if isinstance(settings, CustomJobSettings):
            return custom_job(job_id, settings), settings
        return self._jobs[job_id], settings

    @property
    def settings(self) -> Settings:
        """The configuration, read at the first use. Raises ConfigurationError."""
        with self._lock:
            if not isinstance(self._config, Settings):
                path = None if self._config is None else Path(self._config)
                self._config = load(path, jobs={job.id: job.settings for job in self._jobs.values()})
            return self._config

    @property
    def running(self) -> list[str]:
        """The ids of the jobs that this object is running."""
        return self._supervisor.running if self._supervisor else []

    @property
    def stuck(self) -> list[str]:
        """The ids of those of them that don't end though their time is up."""
        return self._supervisor.stuck if self._supervisor else []

    @property
    def schedules(self) -> dict[str, Schedule]:
        """The schedules of the jobs that `inject_crons` has put on it."""
        with self._lock:
            return {job_id: dispatch.schedule for job_id, dispatch in self._dispatches.items()}

    def request_stop(self) -> None:
        """Ask the running jobs to end after the batch in hand, and let none begin."""
        self._stop_requested.set()
        if self._supervisor:
            self._supervisor.request_stop(JobAborted("the process was asked to stop"))

    def wait(self) -> None:
        """Return when no job is running."""
        if self._supervisor:
            self._supervisor.wait()

    def close(self, abandoned: str | None = None) -> None:
        """Stop, wait for the running jobs to end their batch, and close what this object opened. Idempotent.

        With `abandoned` the running jobs are not waited for, but recorded as aborted for this reason.
        """
        self.request_stop()
        self._close_wakers()
        for resource in self._owned:
            if isinstance(resource, BackgroundTasks):
                resource.safe_stop(wait=abandoned is None)
        if self._tasks is not None:
            for job_id in list(self._dispatches):  # a reload may be under way
                self._take_off_schedule(job_id)
        if abandoned is None:
            self.wait()
        if self._supervisor:
            for job_id in self._supervisor.running:
                with suppress(UnknownJob):  # a reload has removed it
                    self._pings.send(job_id, self.find(job_id)[1].ping_url, "fail", abandoned or "")
            self._supervisor.close(abandoned)
        self._pings.close()
        for resource in self._owned:
            if isinstance(resource, Database):
                resource.close()
        self._owned.clear()

    def _dispatch(self, job_id: str, ledger: Ledger) -> Dispatch:
        job, settings = self.find(job_id)
        schedule = schedule_for(job_id, settings, self.settings.scheduler.timezone)
        trigger = ScheduleTrigger(schedule, job_id, settings.jitter)
        return Dispatch(job_id, schedule, trigger, job.shared, ledger, self._presence)

    def _put_on_schedule(self, tasks: BackgroundTasks, dispatch: Dispatch) -> bool:
        """Return False, with the reason logged, where that can't be done."""
        job_id = dispatch.job_id
        if dispatch.schedule.next_after(datetime.now(UTC)) is None:
            log.info("job_has_no_slot_ahead", job=job_id, trigger=dispatch.schedule.describe())
            return True
        added = tasks.safe_add_task(
            self._run_due,
            args=[job_id, "schedule"],
            trigger=dispatch.trigger,
            id=job_id,
            name=self.find(job_id)[0].summary,
            replace_existing=True,
            # One runs, one finds out that it is still running; more would only pile up.
            max_instances=2,
        )
        return not isinstance(added, int)

    def _take_off_schedule(self, job_id: str) -> None:
        for task_id in (job_id, _catch_up_id(job_id), _woken_id(job_id), _recovery_id(job_id)):
            with suppress(UnknownJob):  # a date's only slot is over
                self._background_tasks().remove_task(task_id)

    def _run_due(self, job_id: str, trigger: Trigger) -> None:
        """Run a job if this process gets its slot. Called in a worker thread whenever a slot comes up."""
        with self._lock:
            dispatch = self._dispatches.get(job_id)
            if dispatch is None:
                return  # a reload has taken it off the schedule
            job, settings = self.find(job_id)
        begun = datetime.now(UTC)
        try:
            run = self._supervise().begin(
                job_id, self._context(job_id, settings, no_progress), lambda: dispatch.claim(trigger)
            )
        except (DatabaseUnavailable, JobInterrupted):
            return  # told already; the slot is accounted for when the database, or a daemon, is back
        except CatfeederCronError as error:
            log.error("slot_not_claimed", job=job_id, reason=str(error))
            return
        if run is None:
            return
        report = self._execute(run, job, settings)
        interval = dispatch.interval(begun)
        if interval and report.duration > interval / 2:
            log.warning(
                "job_slow",
                job=job_id,
                run_id=run.run_id,
                duration_seconds=round(report.duration.total_seconds(), 3),
                interval_seconds=interval.total_seconds(),
            )
        # What came up meanwhile and found no free worker, unless a reload has opened another account.
        with suppress(DatabaseError):
            if self._dispatches.get(job_id) is dispatch:
                dispatch.pass_over(STILL_RUNNING, until=report.started_at + report.duration)

    def _listen(self) -> None:
        """Have jobs run as soon as there is something to do for them."""
        for job_id in self._dispatches:
            wake = self.find(job_id)[0].wake
            if wake is not None and job_id not in self._wakers:
                due_in, run = partial(self._due_in, job_id), partial(self._wake, job_id)
                self._wakers[job_id] = Waker(job_id, self._open_database(), wake.channel, due_in, run)
                self._wakers[job_id].start()

    def _close_wakers(self) -> None:
        for waker in self._wakers.values():
            waker.close()

    def _due_in(self, job_id: str) -> float | None:
        job, settings = self.find(job_id)
        return job.wake.due_in(self._context(job_id, settings, no_progress)) if job.wake else None

    def _wake(self, job_id: str) -> None:
        if not self._stop_requested.is_set():
            self._background_tasks().safe_add_task(
                self._run_woken, args=[job_id], trigger="date", id=_woken_id(job_id), replace_existing=True
            )

    def _run_woken(self, job_id: str) -> None:
        """Run a job between its slots, unless it is running here, or paused."""
        job, settings = self.find(job_id)
        ledger, context = self._open_ledger(), self._context(job_id, settings, no_progress)
        try:
            run = self._supervise().begin(job_id, context, lambda: ledger.claim_woken(job_id, shared=job.shared))
        except (DatabaseUnavailable, JobInterrupted):
            return  # told already; the waker looks again
        except CatfeederCronError as error:
            log.error("slot_not_claimed", job=job_id, reason=str(error))
            return
        if run is not None:
            self._execute(run, job, settings)

    def _after_beat(self) -> None:
        """Open the jobs' accounts at the first heartbeat and after each return; catch up on what is overdue."""
        with self._lock:
            dispatches, returns = dict(self._dispatches), self._presence.returns
        if self._stop_requested.is_set():
            return
        if returns == self._returns_seen:
            dispatches = {job_id: each for job_id, each in dispatches.items() if each.accounted_until is None}
        if dispatches:
            self._open_accounts(dispatches)
            for job_id, job in self._jobs.items():
                if job_id in dispatches and job.recover is not None:
                    self._background_tasks().safe_add_task(
                        self._recover, args=[job_id], trigger="date", id=_recovery_id(job_id), replace_existing=True
                    )
        self._returns_seen = returns

    def _recover(self, job_id: str) -> None:
        try:
            job, settings = self.find(job_id)
            if job.recover is not None:
                job.recover(self._context(job_id, settings, no_progress))
        except DatabaseUnavailable:
            pass  # told by the database itself; called again when it is back
        except CatfeederCronError as error:
            log.error("job_not_recovered", job=job_id, reason=str(error))

    def _open_accounts(self, dispatches: dict[str, Dispatch], gone: Iterable[str] = ()) -> None:
        """Learn how far the jobs' slots are accounted for, and catch up; close the accounts of those `gone`."""
        triggers = {job_id: dispatch.schedule.describe() for job_id, dispatch in dispatches.items()}
        disabled = [job_id for job_id, job in self.settings.jobs.items() if not job.enabled]
        for job_id, accounted_until in self._open_ledger().register(triggers, [*disabled, *gone]).items():
            dispatches[job_id].accounted_until = accounted_until
            self._catch_up(dispatches[job_id])

    def _catch_up(self, dispatch: Dispatch) -> None:
        tasks, job_id = self._background_tasks(), dispatch.job_id
        task = next((task for task in tasks.tasks if tasks.running and task.id == job_id), None)
        soon = dispatch.trigger.get_next_fire_time(None, datetime.now(UTC))
        if task and soon and soon < task.next_run_time:
            # The system's clock was put back, and the task would wait for the time that it showed before.
            self._put_on_schedule(tasks, dispatch)
        if dispatch.due() is None:
            return
        with self._lock:
            if self._dispatches.get(job_id) is not dispatch:
                return
            settings = self.settings.require_job(job_id)
        if settings.catch_up:
            tasks.safe_add_task(
                self._run_due,
                args=[job_id, "catch_up"],
                trigger="date",
                id=_catch_up_id(job_id),
                replace_existing=True,
                max_instances=2,
            )
        else:
            # Not what has just come up: another daemon is about to run it.
            dispatch.pass_over(until=datetime.now(UTC) - _COMING_UP)

    def _execute(self, run: Run, job: Job[Any], settings: JobSettings) -> JobReport:
        self._pings.send(job.id, settings.ping_url, "start")
        report = run_job(job, run.context, settings, run.run_id, known_reason=self._skipped.get(job.id))
        self._skipped[job.id] = report.reason if report.outcome == "skipped" else None
        self._supervise().end(run, report)
        if job.id in self._wakers:
            self._wakers[job.id].ran(fruitful=any(report.counts.values()))
        succeeded = report.outcome in ("succeeded", "skipped")
        self._pings.send(job.id, settings.ping_url, "success" if succeeded else "fail", report.reason or "")
        return report

    def _prepare(self) -> None:
        schema.ensure(self._open_database())
        self._on_contact()

    def _context(self, job_id: str, settings: JobSettings, progress: Progress) -> JobContext:
        return JobContext(
            database=self._open_database(),
            tables=self.settings.database.tables,
            timeout=settings.timeout,
            actions=self.settings.actions,
            progress=progress,
            schedule=schedule_for(job_id, settings, self.settings.scheduler.timezone),
            oauth=self._oauth or OAuthClient(self.settings.oauth),
        )

    def _run_now(self, job_id: str) -> int:
        try:
            report = self.run(job_id)
        except CatfeederCronError as error:
            log.error("job_not_run", job=job_id, reason=str(error))
            return self._error
        return self._success if report.outcome in ("succeeded", "skipped") else self._error

    def _where_it_runs(self, job_id: str) -> str:
        found = self._open_ledger().under_way(job_id)
        if found is None:
            return f"{job_id} was running elsewhere a moment ago; try again"
        host, pid, started_at = found
        return f"{job_id} is running already: on {host}, pid {pid}, since {started_at:%Y-%m-%d %H:%M:%S %Z}"

    def _open_database(self) -> Database:
        with self._lock:
            if self._database is None:
                self._database = Database(self.settings.database)
                self._owned.append(self._database)
            return self._database

    def _open_ledger(self) -> Ledger:
        with self._lock:
            if self._ledger is None:
                self._ledger = Ledger(self._open_database(), self._process)
            return self._ledger

    def _supervise(self) -> Supervisor:
        with self._lock:
            if self._supervisor is None:
                self._supervisor = Supervisor(
                    self._open_ledger(),
                    self._presence,
                    self.settings.scheduler.history_keep,
                    prepare=self._prepare,
                    after_beat=self._after_beat,
                    on_stuck=self._replace_worker,
                    on_change=self._on_change,
                )
                if self._stop_requested.is_set():
                    self._supervisor.request_stop(JobAborted("the process was asked to stop"))
            return self._supervisor

    def _replace_worker(self) -> None:
        if self._tasks is not None:
            self._tasks.replace_worker()

    def _background_tasks(self) -> BackgroundTasks:
        with self._lock:
            if self._tasks is None:
                scheduler = self.settings.scheduler
                self._tasks = BackgroundTasks(
                    debug=self._debug, max_workers=scheduler.max_workers, timezone=scheduler.timezone
                )
                self._owned.append(self._tasks)
            return self._tasks


def _catch_up_id(job_id: str) -> str:
    return f"{job_id} (catching up)"


def _woken_id(job_id: str) -> str:
    return f"{job_id} (woken)"


def _recovery_id(job_id: str) -> str:
    return f"{job_id} (recovering)"


def _slots(settings: JobSettings) -> tuple[object, ...]:
    """What a job's slots follow from."""
    return settings.interval, settings.cron, settings.date, settings.timezone, settings.jitter
