"""What runs the jobs of one configuration: opened together, closed together.

Threads, tasks and callbacks refer to it and to its parts as they like. None of them refers to the Crons that has opened
it, so that a Crons can be dropped, and this let go.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from catfeeder_cron.config import Settings
from catfeeder_cron.database import Database
from catfeeder_cron.errors import JobAborted, JobInterrupted
from catfeeder_cron.job import Job
from catfeeder_cron.ledger import Ledger, Process
from catfeeder_cron.oauth.client import OAuthClient
from catfeeder_cron.scheduler.background_tasks import BackgroundTasks
from catfeeder_cron.scheduler.downtime import Downtime
from catfeeder_cron.scheduler.executor import Executor
from catfeeder_cron.scheduler.job_scheduler import JobScheduler
from catfeeder_cron.scheduler.listeners import Listeners, RunListener
from catfeeder_cron.scheduler.pings import Pings
from catfeeder_cron.scheduler.supervisor import Supervisor

# How long the end of a program waits for runs in threads that it does not wait for by itself.
_EXIT_SECONDS = 5.0

_DROPPED = "the Crons object that ran it was dropped"
_PROGRAM_ENDS = "the program is ending"


@dataclass(frozen=True)
class Given:
    """What a Crons was given, and so is not closed with the rest; and what it wants to be told."""

    jobs: Mapping[str, Job[Any]]
    database: Database | None = None
    background_tasks: BackgroundTasks | None = None
    oauth: OAuthClient | None = None
    listeners: tuple[RunListener, ...] = ()


class Runtime:
    """It is a lifecycle.Resource. All methods may be called from any thread. Nothing connects before it has to."""

    def __init__(self, settings: Settings, given: Given, tasks: BackgroundTasks) -> None:
        self._owns_database = given.database is None
        self._owns_tasks = given.background_tasks is None
        self._is_scheduled = False
        self.database = given.database or Database(settings.database)
        self.tasks = tasks
        downtime = Downtime(datetime.now(UTC))
        self.ledger = Ledger(self.database, Process("run-once"))
        self.listeners = Listeners(*given.listeners)
        self.supervisor = Supervisor(self.ledger, downtime, settings.scheduler.history_keep, self.listeners)
        self.executor = Executor(settings, given.jobs, self.database, self.supervisor, given.oauth)
        self.job_scheduler = JobScheduler(tasks, self.executor, self.database, self.ledger, downtime)
        self._pings = Pings()
        self.listeners.add(self.job_scheduler)
        self.listeners.add(self._pings)

    def schedule(self) -> bool:
        """Put every enabled job on the schedule, and start it if it is ours; False where that failed."""
        self._is_scheduled = True
        self.ledger.become_daemon()
        filled = self.job_scheduler.schedule_all()
        self.supervisor.start()
        started = not self._owns_tasks or self.tasks.safe_start() == self.tasks.success
        return filled and started

    def request_stop(self, reason: JobInterrupted) -> None:
        """Ask the running jobs to end after the batch in hand, and let none begin."""
        self.supervisor.runs.request_stop(reason)

    def close(self, abandoned: str | None = None) -> None:
        """Wait for the running jobs, and close everything that was not given. Idempotent.

        With `abandoned` they are not waited for, but recorded as aborted for this reason.
        """
        if self._owns_tasks:
            self.tasks.safe_stop(wait=abandoned is None)
        self.job_scheduler.close()
        self.executor.close(abandoned)
        self._pings.close()
        if self._owns_database:
            self.database.close()

    # What `lifecycle` asks for.

    def ask_to_end(self) -> None:
        # What another thread of the program runs by hand is that thread's affair for as long as it lives.
        if self._is_scheduled:
            self.request_stop(JobAborted(_PROGRAM_ENDS))

    def wait_for_schedule(self) -> None:
        """Leave that to the BackgroundTasks."""

    def let_go(self, *, at_exit: bool) -> None:
        self.request_stop(JobAborted(_PROGRAM_ENDS if at_exit else _DROPPED))
        if at_exit:
            self.supervisor.runs.wait(_EXIT_SECONDS)
        self.close(abandoned=_PROGRAM_ENDS if at_exit else None)
