"""The configured jobs: on a schedule, or one of them now."""

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self, final

from catfeeder_cron import schema
from catfeeder_cron.background_tasks import BackgroundTasks
from catfeeder_cron.config import JobSettings, Settings, load
from catfeeder_cron.database import Database
from catfeeder_cron.errors import CatfeederCronError, JobAborted, JobIsRunning
from catfeeder_cron.job import Job, JobReport, Progress, no_progress
from catfeeder_cron.jobs import built_in
from catfeeder_cron.ledger import Ledger, Process
from catfeeder_cron.logs import get_logger
from catfeeder_cron.oauth.client import OAuthClient
from catfeeder_cron.presence import Presence
from catfeeder_cron.schedule import Schedule
from catfeeder_cron.supervisor import Supervisor
from catfeeder_cron.timetable import Timetable
from catfeeder_cron.workshop import Workshop

log = get_logger(__name__)

_TRY_AGAIN_SECONDS = 0.5
_STOPPING = "the process was asked to stop"


@dataclass(frozen=True)
class _Parts:
    """What a Crons works with. Nothing of it connects to anything before it has to."""

    database: Database
    tasks: BackgroundTasks
    ledger: Ledger
    supervisor: Supervisor
    workshop: Workshop
    timetable: Timetable


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
        self._config = config
        self._database = database
        self._tasks = background_tasks
        self._oauth = oauth
        self._jobs = built_in() if jobs is None else jobs
        self._on_contact = on_contact
        self._on_change = on_change
        self._parts: _Parts | None = None
        self._lock = threading.Lock()
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
            parts = self._open()
        except CatfeederCronError as error:
            log.error("jobs_not_scheduled", reason=str(error))
            return self._error
        parts.ledger.become_daemon()
        filled = parts.timetable.fill()
        parts.supervisor.start()
        started = parts.tasks is self._tasks or parts.tasks.safe_start() == 0
        return self._success if filled and started else self._error

    def reload(self, settings: Settings) -> None:
        """Go on with another configuration. Running jobs keep the settings that they began with.

        A job whose trigger stays the same keeps its slots. What can't be changed in a running process stays as it is.
        """
        _log_warnings(settings)
        self._open().timetable.reload(settings)

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
        parts = self._open()
        if dry_run:
            return parts.workshop.dry_run(job_id, progress)
        job, _ = parts.workshop.find(job_id)
        claim = partial(parts.ledger.claim_manual, job_id, shared=job.shared)
        parts.supervisor.beat()
        parts.supervisor.start()
        patience = time.monotonic() + wait.total_seconds()
        while (report := parts.workshop.run(job_id, claim, progress)) is None:
            if time.monotonic() >= patience:
                raise JobIsRunning(_where_it_runs(job_id, parts.ledger))
            self._stop_requested.wait(_TRY_AGAIN_SECONDS)
        parts.timetable.ran(report)
        return report

    def find(self, job_id: str) -> tuple[Job[Any], JobSettings]:
        """Return a job and its settings. Raises UnknownJob, which names the nearest id."""
        return self._open().workshop.find(job_id)

    @property
    def settings(self) -> Settings:
        """The configuration, read at the first use. Raises ConfigurationError."""
        return self._open().workshop.settings

    @property
    def running(self) -> list[str]:
        """The ids of the jobs that this object is running."""
        return self._parts.supervisor.running if self._parts else []

    @property
    def stuck(self) -> list[str]:
        """The ids of those of them that don't end though their time is up."""
        return self._parts.supervisor.stuck if self._parts else []

    @property
    def schedules(self) -> dict[str, Schedule]:
        """The schedules of the jobs that `inject_crons` has put on it."""
        return self._parts.timetable.schedules if self._parts else {}

    def request_stop(self) -> None:
        """Ask the running jobs to end after the batch in hand, and let none begin."""
        with self._lock:  # one that is being opened meanwhile finds out in the end
            self._stop_requested.set()
            if self._parts:
                self._parts.supervisor.request_stop(JobAborted(_STOPPING))

    def wait(self) -> None:
        """Return when no job is running."""
        if self._parts:
            self._parts.supervisor.wait()

    def close(self, abandoned: str | None = None) -> None:
        """Stop, wait for the running jobs to end their batch, and close what this object opened. Idempotent.

        With `abandoned` the running jobs are not waited for, but recorded as aborted for this reason.
        """
        self.request_stop()
        parts = self._parts
        if parts is None:
            return
        if parts.tasks is not self._tasks:
            parts.tasks.safe_stop(wait=abandoned is None)
        parts.timetable.close()
        parts.workshop.close(abandoned)
        if parts.database is not self._database:
            parts.database.close()

    def _open(self) -> _Parts:
        with self._lock:
            if self._parts is None:
                self._parts = self._make_parts()
                if self._stop_requested.is_set():
                    self._parts.supervisor.request_stop(JobAborted(_STOPPING))
            return self._parts

    def _make_parts(self) -> _Parts:
        settings = self._config if isinstance(self._config, Settings) else self._load(self._config)
        _log_warnings(settings)
        scheduler = settings.scheduler
        database = self._database or Database(settings.database)
        tasks = self._tasks or BackgroundTasks(
            debug=self._debug, max_workers=scheduler.max_workers, timezone=scheduler.timezone
        )
        ledger, presence = Ledger(database, Process("run-once")), Presence(datetime.now(UTC))

        contacted = threading.Event()

        def prepare() -> None:
            schema.ensure(database)
            if not contacted.is_set():  # it is called until a heartbeat gets through
                contacted.set()
                self._on_contact()

        supervisor = Supervisor(
            ledger,
            presence,
            scheduler.history_keep,
            prepare=prepare,
            after_beat=lambda: timetable.after_beat(),
            on_stuck=tasks.replace_worker,
            on_retry=lambda job_id, retry_in: timetable.retry(job_id, retry_in),
            on_change=self._on_change,
        )
        workshop = Workshop(settings, self._jobs, database, supervisor, self._oauth)
        timetable = Timetable(tasks, workshop, database, ledger, presence)
        return _Parts(database, tasks, ledger, supervisor, workshop, timetable)

    def _load(self, path: Path | str | None) -> Settings:
        return load(None if path is None else Path(path), jobs={job.id: job.settings for job in self._jobs.values()})

    def _run_now(self, job_id: str) -> int:
        try:
            report = self.run(job_id)
        except CatfeederCronError as error:
            log.error("job_not_run", job=job_id, reason=str(error))
            return self._error
        return self._success if report.outcome in ("succeeded", "skipped") else self._error


def _log_warnings(settings: Settings) -> None:
    for warning in settings.warnings:
        log.warning("configuration_warning", warning=warning)


def _where_it_runs(job_id: str, ledger: Ledger) -> str:
    found = ledger.under_way(job_id)
    if found is None:
        return f"{job_id} was running elsewhere a moment ago; try again"
    host, pid, started_at = found
    return f"{job_id} is running already: on {host}, pid {pid}, since {started_at:%Y-%m-%d %H:%M:%S %Z}"
