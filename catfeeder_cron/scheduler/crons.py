"""Runs the configured jobs: on a schedule, or one of them now."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Self, final

from catfeeder_cron import lifecycle
from catfeeder_cron.config import JobSettings, Settings
from catfeeder_cron.database import Database
from catfeeder_cron.errors import CatfeederCronError, JobAborted
from catfeeder_cron.job import Job
from catfeeder_cron.jobs import built_in, load_settings
from catfeeder_cron.logs import get_logger, show_debug_records
from catfeeder_cron.oauth.client import OAuthClient
from catfeeder_cron.report import JobReport, Progress, no_progress
from catfeeder_cron.schedule import Schedule
from catfeeder_cron.scheduler.admission import STOPPING, Admission
from catfeeder_cron.scheduler.background_tasks import BackgroundTasks
from catfeeder_cron.scheduler.listeners import RunListener
from catfeeder_cron.scheduler.runtime import Given, Runtime

log = get_logger("catfeeder_cron.scheduler")


@final
class Crons:
    """The jobs of a configuration.

    The object opens from the configuration, at the first use, each part that is not handed in, and closes it in `close`
    (or at the end of a `with` block); parts that are handed in stay open. `config` is a Settings object or the path of
    a file; by default the file is found as the command line finds it. `jobs` are all jobs that exist beside those of
    the configuration, by default the built-in ones. `debug` makes the debug records of this package visible, as in
    BackgroundTasks.

    `inject_crons` and the methods named after jobs return `success` or `error` and log the reason; the others raise.

    All methods may be called from any thread, whether or not an event loop runs there. When the object is dropped, or
    the program ends, everything that it has opened is closed within seconds, and a BackgroundTasks that was handed in
    loses its tasks; running jobs are asked to end and recorded. In a forked process, an object that was in use before
    the fork refuses to work, with an error that says so: make it, or use it for the first time, after the fork.
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
    ) -> None:
        self._error = error
        self._success = success
        self._debug = debug
        self._config = config
        jobs = built_in() if jobs is None else jobs
        self._given = Given(jobs, database, background_tasks, oauth)
        self._tasks = background_tasks
        self._runtime: Runtime | None = None
        self._tell_closed: Callable[[], None] = lambda: None
        self._admission = Admission()
        lifecycle.after_fork(self, Crons._after_fork)
        if debug:
            show_debug_records()

    def __init_subclass__(cls) -> None:
        raise TypeError("Crons is final and can't be subclassed")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    @property
    def success(self) -> int:
        """The value that the methods which don't raise return for a success."""
        return self._success

    @property
    def error(self) -> int:
        """The value that the methods which don't raise return for a failure."""
        return self._error

    @property
    def debug(self) -> bool:
        """Whether debug records were asked for."""
        return self._debug

    @property
    def background_tasks(self) -> BackgroundTasks:
        """The BackgroundTasks that keeps the schedule: the one that was handed in, or one that this object opens.

        Raises ConfigurationError: the object is opened from the configuration.
        """
        return self._given.background_tasks or self._open().tasks

    def listen(self, listener: RunListener) -> None:
        """Tell the listener about the runs of this object, from now on."""
        with self._admission.lock:
            self._given = replace(self._given, listeners=(*self._given.listeners, listener))
            if self._runtime is not None:
                self._runtime.listeners.add(listener)

    def inject_crons(self) -> int:
        """Schedule every enabled job, in place of those that an earlier call scheduled.

        This starts the BackgroundTasks that this object opened; the owner starts one that was handed in.
        """
        try:
            runtime = self._open()
            with self._admission.lock:
                self._admission.use()
                self._admission.refuse_if_stopping()
                scheduled = runtime.schedule()
                self._refuse_if_closed_meanwhile(runtime)
        except (CatfeederCronError, RuntimeError) as error:  # RuntimeError: no thread can be started
            log.error("jobs_not_scheduled", reason=str(error))
            return self._error
        log.debug("jobs_scheduled", jobs=list(runtime.job_scheduler.schedules))
        return self._success if scheduled else self._error

    def reload(self, settings: Settings) -> None:
        """Put another configuration in force. Running jobs keep the settings that they began with.

        A job whose trigger does not change keeps its slots. Settings that can't change in a running process stay.
        """
        runtime = self._open()
        with self._admission.lock:
            self._admission.use()
        _log_warnings(settings)
        runtime.reload(settings)

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

    def reset_food_counters(self) -> int:
        """Begin a new feeding period now for every pet whose "food_reset" has passed."""
        return self._run_now("reset-food-counters")

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
        """Run a job now in this thread, enabled or not, and return its report.

        A dry run leaves no trace in the ledger. Raises UnknownJob, ConfigurationError, JobIsRunning if the job still
        runs after `wait`, in whatever process, JobAborted after `request_stop` or `close`, and a DatabaseError if the
        ledger can't be reached.
        """
        runtime = self._open()
        with self._admission.lock:
            self._admission.use()
        if dry_run:
            return runtime.executor.dry_run(job_id, progress)
        self._admission.refuse_if_stopping()
        return runtime.run_manually(job_id, progress, wait, self._admission.stop_requested)

    def find(self, job_id: str) -> tuple[Job[Any], JobSettings]:
        """Return a job and its settings. Raises UnknownJob, which names the nearest id."""
        return self._open().executor.find(job_id)

    @property
    def settings(self) -> Settings:
        """The configuration, read at the first use. Raises ConfigurationError."""
        return self._open().executor.settings

    @property
    def running(self) -> list[str]:
        """The ids of the jobs that this object is running."""
        runtime = self._here()
        return runtime.supervisor.runs.job_ids if runtime else []

    @property
    def stuck(self) -> list[str]:
        """The ids of those running jobs that don't end though their time is up."""
        runtime = self._here()
        return runtime.supervisor.timeouts.stuck if runtime else []

    @property
    def troubles(self) -> list[str]:
        """What is wrong with the clocks or the database's history, a line each."""
        runtime = self._here()
        return runtime.troubles if runtime else []

    @property
    def now(self) -> datetime:
        """The time by the database's clock, as far as it is known, which slots go by."""
        runtime = self._here()
        return runtime.clock.now() if runtime else datetime.now(UTC)

    @property
    def schedules(self) -> dict[str, Schedule]:
        """The schedules of the jobs that `inject_crons` has scheduled, by their ids."""
        runtime = self._here()
        return runtime.job_scheduler.schedules if runtime else {}

    def request_stop(self) -> None:
        """Ask the running jobs to end after their current batch, and let none begin."""
        with self._admission.lock:  # a thread that is opening the runtime looks at the request afterwards
            self._admission.stop_requested.set()
            if runtime := self._here():
                runtime.request_stop(JobAborted(STOPPING))

    def wait(self) -> None:
        """Return when no job is running."""
        if runtime := self._here():
            runtime.supervisor.runs.wait()

    def close(self, abandoned: str | None = None) -> None:
        """Stop, wait for the running jobs to end their batch, and close all that this object opened. Idempotent.

        With `abandoned` it does not wait for the running jobs, but records them as aborted for this reason.
        """
        with self._admission.lock:
            self._admission.closed = True
        self.request_stop()
        if runtime := self._here():
            runtime.close(abandoned)
            self._tell_closed()

    def _open(self) -> Runtime:
        if self._runtime is None:
            lifecycle.wait_for_dropped()
        with self._admission.lock:
            self._admission.refuse_the_parents()
            if self._runtime is None:
                self._admission.refuse_if_closed()
                self._runtime = self._make_runtime()
                self._tell_closed = lifecycle.keep(self, self._runtime)
                if self._admission.stop_requested.is_set():
                    self._runtime.request_stop(JobAborted(STOPPING))
            return self._runtime

    def _make_runtime(self) -> Runtime:
        settings = self._config if isinstance(self._config, Settings) else self._load(self._config)
        _log_warnings(settings)
        if self._tasks is None:
            scheduler = settings.scheduler
            self._tasks = BackgroundTasks(
                debug=self._debug, max_workers=scheduler.max_workers, timezone=scheduler.timezone
            )
        return Runtime(settings, self._given, self._tasks)

    def _here(self) -> Runtime | None:
        """Return the runtime, if it was opened and belongs to this process."""
        return None if self._admission.is_the_parents else self._runtime

    def _refuse_if_closed_meanwhile(self, runtime: Runtime) -> None:
        """Close the runtime again if a signal's handler, in this thread, has closed the object in between."""
        if self._admission.closed:
            runtime.close()
            self._admission.refuse_if_closed()

    def _after_fork(self) -> None:
        """Leave a runtime in use to the parent, and forget one that was only opened.

        The latter is opened again when it is needed: this process has an identity of its own in the ledger.
        """
        self._admission.after_fork()
        if not self._admission.is_the_parents:
            self._runtime = None

    def _load(self, path: Path | str | None) -> Settings:
        return load_settings(None if path is None else Path(path), jobs=self._given.jobs)

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
