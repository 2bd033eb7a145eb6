"""The configured jobs: on a schedule, or one of them now."""

import threading
import time
from datetime import UTC, datetime, timedelta
from difflib import get_close_matches
from pathlib import Path
from types import TracebackType
from typing import Any, Self, final

from catfeeder_cron import schema
from catfeeder_cron.background_tasks import BackgroundTasks
from catfeeder_cron.config import JobSettings, Settings, load
from catfeeder_cron.database import Database
from catfeeder_cron.dispatch import Dispatch
from catfeeder_cron.errors import CatfeederCronError, DatabaseUnavailable, JobAborted, JobIsRunning, UnknownJob
from catfeeder_cron.job import Job, JobContext, JobReport, Progress, no_progress
from catfeeder_cron.jobs import built_in
from catfeeder_cron.ledger import Ledger, Process
from catfeeder_cron.logs import get_logger
from catfeeder_cron.oauth.client import OAuthClient
from catfeeder_cron.presence import Presence
from catfeeder_cron.runner import run_job
from catfeeder_cron.schedule import schedule_for
from catfeeder_cron.supervisor import Supervisor
from catfeeder_cron.triggers import ScheduleTrigger

log = get_logger(__name__)

_TRY_AGAIN_SECONDS = 0.5


@final
class Crons:
    """The jobs of a configuration.

    What is not handed in is opened from the configuration at its first use and closed by `close` (or by leaving a
    `with` block); what is handed in stays its owner's. `config` is a Settings object or the path of a file; by default
    the file is looked up as the command line does. All methods may be called from any thread.

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
    ) -> None:
        self._error = error
        self._success = success
        self._debug = debug
        self._jobs = built_in()
        self._config = config
        self._database = database
        self._tasks = background_tasks
        self._oauth = oauth
        self._owned: list[Database | BackgroundTasks] = []
        self._lock = threading.RLock()
        self._process = Process("run-once")
        self._presence = Presence(datetime.now(UTC))
        self._ledger: Ledger | None = None
        self._supervisor: Supervisor | None = None
        self._dispatches: dict[str, Dispatch] = {}
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
        except CatfeederCronError as error:
            log.error("jobs_not_scheduled", reason=str(error))
            return self._error
        ledger.become_daemon()
        failed = False
        for job_id, job_settings in settings.jobs.items():
            if job_settings.enabled and job_id in self._jobs:
                failed = not self._schedule(tasks, ledger, job_id, job_settings) or failed
        self._supervise().start()
        if tasks in self._owned:
            failed = tasks.safe_start() != 0 or failed
        return self._error if failed else self._success

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
        after `wait`, in whatever process, and a DatabaseError where the ledger can't be reached.
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
        while (run_id := ledger.claim_manual(job_id, shared=job.shared)) is None:
            if time.monotonic() >= patience or self._stop_requested.wait(_TRY_AGAIN_SECONDS):
                raise JobIsRunning(self._where_it_runs(job_id))
        return self._execute(job_id, run_id, context)

    def find(self, job_id: str) -> tuple[Job[Any], JobSettings]:
        """Return a job and its settings. Raises UnknownJob, which names the nearest id."""
        if job_id in self._jobs:
            return self._jobs[job_id], self.settings.jobs[job_id]
        nearest = get_close_matches(job_id, self._jobs, n=1, cutoff=0)
        raise UnknownJob(f'there is no job "{job_id}"; the nearest is "{nearest[0]}"')

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
        for resource in self._owned:
            if isinstance(resource, BackgroundTasks):
                resource.safe_stop(wait=abandoned is None)
        if abandoned is None:
            self.wait()
        if self._supervisor:
            self._supervisor.close(abandoned)
        for resource in self._owned:
            if isinstance(resource, Database):
                resource.close()
        self._owned.clear()

    def _schedule(self, tasks: BackgroundTasks, ledger: Ledger, job_id: str, settings: JobSettings) -> bool:
        """Put a job on the schedule; return False, with the reason logged, where that can't be done."""
        schedule = schedule_for(job_id, settings, self.settings.scheduler.timezone)
        self._dispatches[job_id] = Dispatch(
            job_id=job_id,
            schedule=schedule,
            jitter=settings.jitter,
            catch_up=settings.catch_up,
            shared=self._jobs[job_id].shared,
            ledger=ledger,
            presence=self._presence,
        )
        if schedule.next_after(datetime.now(UTC)) is None:
            log.info("job_has_no_slot_ahead", job=job_id, trigger=schedule.describe())
            return True
        added = tasks.safe_add_task(
            self._run_due,
            args=[job_id],
            trigger=ScheduleTrigger(schedule, job_id, settings.jitter),
            id=job_id,
            name=self._jobs[job_id].summary,
            replace_existing=True,
            # One runs, one finds out that it is still running; more would only pile up.
            max_instances=2,
        )
        return not isinstance(added, int)

    def _run_due(self, job_id: str) -> None:
        """Run a job if this process gets its slot. Called by the scheduler whenever one comes up."""
        if self._stop_requested.is_set():
            return
        try:
            run_id = self._dispatches[job_id].claim_due()
        except DatabaseUnavailable:
            return  # told by the database itself; the slot is accounted for when it is back
        except CatfeederCronError as error:
            log.error("slot_not_claimed", job=job_id, reason=str(error))
            return
        if run_id is not None:
            self._run_claimed(job_id, run_id)

    def _catch_up(self) -> None:
        """Account for what went by while nobody could, and run what is overdue, each job once."""
        ledger, tasks = self._open_ledger(), self._background_tasks()
        triggers = {job_id: dispatch.schedule.describe() for job_id, dispatch in self._dispatches.items()}
        if not triggers:
            return
        for job_id in triggers:
            if self._jobs[job_id].recover is not None:
                tasks.safe_add_task(self._recover, args=[job_id], trigger="date")
        disabled = [job_id for job_id in self.settings.jobs if job_id not in triggers]
        for job_id, accounted_until in ledger.register(triggers, disabled).items():
            run_id = self._dispatches[job_id].claim_overdue(accounted_until)
            if run_id is not None:
                tasks.safe_add_task(self._run_claimed, args=[job_id, run_id], trigger="date")

    def _run_claimed(self, job_id: str, run_id: int) -> None:
        _, settings = self.find(job_id)
        self._execute(job_id, run_id, self._context(job_id, settings, no_progress))

    def _recover(self, job_id: str) -> None:
        job, settings = self.find(job_id)
        assert job.recover is not None
        try:
            job.recover(self._context(job_id, settings, no_progress))
        except DatabaseUnavailable:
            pass  # told by the database itself; called again when it is back
        except CatfeederCronError as error:
            log.error("job_not_recovered", job=job_id, reason=str(error))

    def _execute(self, job_id: str, run_id: int, context: JobContext) -> JobReport:
        job, settings = self.find(job_id)
        supervisor = self._supervise()
        run = supervisor.begin(run_id, job_id, context)
        report = run_job(job, context, settings, run_id)
        supervisor.end(run, report)
        return report

    def _context(self, job_id: str, settings: JobSettings, progress: Progress) -> JobContext:
        return JobContext(
            database=self._open_database(),
            tables=self.settings.database.tables,
            timeout=settings.timeout,
            progress=progress,
            schedule=schedule_for(job_id, settings, self.settings.scheduler.timezone),
            oauth=self._open_oauth(),
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

    def _open_oauth(self) -> OAuthClient:
        with self._lock:
            if self._oauth is None:
                self._oauth = OAuthClient(self.settings.oauth)
            return self._oauth

    def _open_ledger(self) -> Ledger:
        with self._lock:
            if self._ledger is None:
                self._ledger = Ledger(self._open_database(), self._process)
            return self._ledger

    def _supervise(self) -> Supervisor:
        with self._lock:
            if self._supervisor is None:
                database = self._open_database()
                self._supervisor = Supervisor(
                    self._open_ledger(),
                    self._presence,
                    self.settings.scheduler.history_keep,
                    prepare=lambda: schema.ensure(database),
                    on_return=self._catch_up,
                    on_stuck=lambda: self._background_tasks().replace_worker(),
                )
                if self._stop_requested.is_set():
                    self._supervisor.request_stop(JobAborted("the process was asked to stop"))
            return self._supervisor

    def _background_tasks(self) -> BackgroundTasks:
        with self._lock:
            if self._tasks is None:
                scheduler = self.settings.scheduler
                self._tasks = BackgroundTasks(
                    debug=self._debug, max_workers=scheduler.max_workers, timezone=scheduler.timezone
                )
                self._owned.append(self._tasks)
            return self._tasks
