"""Wires the parts that run the jobs of one configuration: they are opened together and closed together.

Threads, tasks and callbacks may refer to the runtime and to its parts. None of them refers to the Crons that opened
it, so that a dropped Crons is collected, and its runtime closed.
"""

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

from catfeeder_cron.config import CustomJobSettings, Settings, state_directory
from catfeeder_cron.custom_jobs import custom_job
from catfeeder_cron.database import Database
from catfeeder_cron.errors import JobAborted, JobInterrupted, JobIsRunning
from catfeeder_cron.job import Job
from catfeeder_cron.ledger import Ledger, Process
from catfeeder_cron.oauth.client import OAuthClient
from catfeeder_cron.report import JobReport, Progress
from catfeeder_cron.scheduler.background_tasks import BackgroundTasks
from catfeeder_cron.scheduler.downtime import Downtime
from catfeeder_cron.scheduler.executor import Executor
from catfeeder_cron.scheduler.job_scheduler import JobScheduler
from catfeeder_cron.scheduler.job_tasks import JobTasks
from catfeeder_cron.scheduler.listeners import Listeners, RunListener
from catfeeder_cron.scheduler.pings import Pings
from catfeeder_cron.scheduler.server_clock import ServerClock
from catfeeder_cron.scheduler.supervisor import Supervisor
from catfeeder_cron.scheduler.tending import JobTending
from catfeeder_cron.scheduler.wakers import JobWakers

_TRY_AGAIN_SECONDS = 0.5
# How long the end of a program waits for runs in threads that it does not wait for by itself.
_EXIT_SECONDS = 5.0

_DROPPED = "the Crons object that ran it was dropped"
_PROGRAM_ENDS = "the program is ending"


@dataclass(frozen=True)
class Given:
    """The parts that a Crons was given, which its runtime does not close, and the listeners."""

    jobs: Mapping[str, Job[Any]]
    database: Database | None = None
    background_tasks: BackgroundTasks | None = None
    oauth: OAuthClient | None = None
    listeners: tuple[RunListener, ...] = ()


class Runtime:
    """The parts of one configuration, as a lifecycle.Resource.

    All methods may be called from any thread. No connection is opened before it is needed.
    """

    def __init__(self, settings: Settings, given: Given, tasks: BackgroundTasks) -> None:
        self._owns_database = given.database is None
        self._owns_tasks = given.background_tasks is None
        self._is_scheduled = False
        self._jobs = given.jobs
        self.database = given.database or Database(settings.database)
        self.tasks = tasks
        downtime = Downtime(datetime.now(UTC))
        self.clock = ServerClock()
        self.ledger = Ledger(self.database, Process("run-once"), state_directory())
        self.listeners = Listeners(*given.listeners)
        self.supervisor = Supervisor(self.ledger, downtime, settings.scheduler.history_keep, self.listeners, self.clock)
        self.executor = Executor(settings, _all_jobs(given.jobs, settings), self.database, self.supervisor, given.oauth)
        self._job_tasks = JobTasks(tasks)
        self.job_scheduler = JobScheduler(self._job_tasks, self.executor, self.ledger, downtime, self.clock)
        self._wakers = JobWakers(self._job_tasks, self.executor, self.database, self.ledger)
        self._tending = JobTending(self._job_tasks, self.executor, self.database)
        self._pings = Pings()
        parts = (self.clock, self._job_tasks, self.job_scheduler, self._tending, self._wakers, self._pings)
        for listener in parts:
            self.listeners.add(listener)

    @property
    def troubles(self) -> list[str]:
        """What is wrong with the clocks or the database's history, a line each."""
        lineage = self.database.lineage
        return [trouble for trouble in (lineage.stale if lineage else "", self.clock.trouble) if trouble]

    def schedule(self) -> bool:
        """Schedule every enabled job, and start the BackgroundTasks that was not given. Returns False on a failure."""
        self._is_scheduled = True
        self.ledger.become_daemon()
        scheduled = self.job_scheduler.schedule_all()
        self._wakers.start(self.job_scheduler.schedules)
        self._tending.start()
        self.supervisor.start()
        started = not self._owns_tasks or self.tasks.safe_start() == self.tasks.success
        return scheduled and started

    def reload(self, settings: Settings) -> None:
        """Put another configuration in force. Raises the errors of JobScheduler.reload."""
        self.job_scheduler.reload(settings, _all_jobs(self._jobs, settings))

    def run_manually(
        self, job_id: str, progress: Progress, wait: timedelta, stop_requested: threading.Event
    ) -> JobReport:
        """Run a job now in this thread, and return its report.

        Raises JobIsRunning where it still runs after `wait`, in whatever process, and the errors of Executor.run.
        """
        job, _ = self.executor.find(job_id)
        claim = partial(self.ledger.claim_manual, job_id, shared=job.shared)
        self.supervisor.beat()
        self.supervisor.start()
        deadline = time.monotonic() + wait.total_seconds()
        while (report := self.executor.run(job_id, claim, "manual", progress)) is None:
            if time.monotonic() >= deadline:
                raise JobIsRunning(_where_it_runs(job_id, self.ledger))
            stop_requested.wait(_TRY_AGAIN_SECONDS)
        return report

    def request_stop(self, reason: JobInterrupted) -> None:
        """Ask the running jobs to end after their current batch, and let none begin."""
        self.supervisor.runs.request_stop(reason)

    def close(self, abandoned: str | None = None) -> None:
        """Wait for the running jobs, and close everything that was not given. Idempotent.

        With `abandoned` it does not wait for the running jobs, but records them as aborted for this reason.
        """
        if self._owns_tasks:
            self.tasks.safe_stop(wait=abandoned is None)
        self._job_tasks.close()
        self._wakers.close()
        self.executor.close(abandoned)
        self._pings.close()
        if self._owns_database:
            self.database.close()

    # The methods of a lifecycle.Resource.

    def ask_to_end(self) -> None:
        """Ask scheduled runs to end. Runs by hand, in other threads of the program, go on."""
        if self._is_scheduled:
            self.request_stop(JobAborted(_PROGRAM_ENDS))

    def wait_for_schedule(self) -> None:
        """Do nothing: the BackgroundTasks waits for its tasks."""

    def let_go(self, *, at_exit: bool) -> None:
        """Stop the runs and close everything; `at_exit`, record runs that last longer than 5 seconds as aborted."""
        self.request_stop(JobAborted(_PROGRAM_ENDS if at_exit else _DROPPED))
        if at_exit:
            self.supervisor.runs.wait(_EXIT_SECONDS)
        self.close(abandoned=_PROGRAM_ENDS if at_exit else None)


def _all_jobs(jobs: Mapping[str, Job[Any]], settings: Settings) -> dict[str, Job[Any]]:
    """Return these jobs, and those that only exist in the configuration."""
    custom = {
        job_id: custom_job(job_id, job) for job_id, job in settings.jobs.items() if isinstance(job, CustomJobSettings)
    }
    return {**jobs, **custom}


def _where_it_runs(job_id: str, ledger: Ledger) -> str:
    found = ledger.under_way(job_id)
    if found is None:
        return f"{job_id} was running elsewhere a moment ago; try again"
    host, pid, started_at = found
    return f"{job_id} is running already: on {host}, pid {pid}, since {started_at:%Y-%m-%d %H:%M:%S %Z}"
