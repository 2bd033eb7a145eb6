"""Defines a job, and the context that a run of a job gets."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Generic, TypeVar

from catfeeder_cron.children.pool import Children
from catfeeder_cron.config import ActionsSettings, DatabaseTables, JobSettings, OAuthSettings, Settings, state_directory
from catfeeder_cron.database import Connection, Database
from catfeeder_cron.database.catalog import WantedIndex
from catfeeder_cron.database.requirements import TableUse
from catfeeder_cron.errors import StatementTimeout
from catfeeder_cron.oauth.client import OAuthClient
from catfeeder_cron.report import Finding, Progress, no_progress
from catfeeder_cron.run_control import RunControl
from catfeeder_cron.schedule import Schedule

S = TypeVar("S", bound=JobSettings)


@dataclass(frozen=True)
class Wake:
    """Has a job run between its slots, by notifications and due times; the slots catch up on missed ones."""

    channel: str
    """The PostgreSQL channel whose notifications start a run."""
    due_in: Callable[["JobContext"], float | None]
    """Returns in how many seconds the next run is due; None while none is known."""


@dataclass(frozen=True)
class Job(Generic[S]):
    """A kind of work with its settings. `run` returns when all work is done, and raises when some is not."""

    id: str
    summary: str
    settings: type[S]
    run: Callable[["JobContext", S], None]
    shared: bool = False
    """Whether every daemon works on each slot, because the job divides its rows by leases."""
    irreversible: bool = False
    """Whether it has effects outside of the database, so that it must not run on an old copy of it."""
    tables: tuple[TableUse, ...] = ()
    wanted_indexes: tuple[WantedIndex, ...] = ()
    wake: "Wake | None" = None
    recover: Callable[["JobContext"], None] | None = None
    """Finishes work that a dead process or an outage left half done; called when a daemon reaches the database."""
    tend: Callable[["JobContext"], None] | None = None
    """Looks after files that must not grow old. A daemon calls it every few minutes, whether the job is enabled or not,
    and more often for some minutes after a failover or a restored backup."""
    check: Callable[[Database, Settings, bool], Iterator[Finding]] | None = None
    """Yields further findings for `check`; its last argument says whether the job's tables are as it needs them.

    It may raise DatabaseUnavailable.
    """

    def refused_on(self, database: Database) -> str:
        """Return why the job must not run on this database as it is; empty if it may."""
        return database.lineage.stale if self.irreversible and database.lineage else ""


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What a process keeps for those jobs that ask for it; runs of all threads share it."""

    oauth: OAuthClient = field(default_factory=lambda: OAuthClient(OAuthSettings()))
    children: Children = field(default_factory=Children)
    """The processes for the operator's code."""
    actions: ActionsSettings = field(default_factory=ActionsSettings)
    state_directory: Path = field(default_factory=state_directory)
    """The folder for files that must survive the process; it need not exist."""


@dataclass(kw_only=True)
class JobContext(RunControl):
    """Everything that one run of a job gets, with the RunControl that can end it."""

    database: Database
    tables: DatabaseTables
    dry_run: bool = False
    progress: Progress = no_progress
    schedule: Schedule | None = None
    """The job's slots."""
    slot: datetime | None = None
    """The slot that this run is for; None for a run between slots."""
    resources: Resources = field(default_factory=Resources)
    by_provider: dict[str, Counter[str]] = field(default_factory=dict)
    """The counts by provider, for a job that works with OAuth providers."""
    provider_reasons: dict[str, str] = field(default_factory=dict)
    """The reason, by provider, why some work is left."""

    def transaction(self, **local: str | int) -> AbstractContextManager[Connection]:
        """Yield a connection as Database.transaction does, with the rest of the run's time as statement timeout.

        Raises JobTimedOut when that is used up, and before the transaction as `checkpoint` does.
        """
        return self._within_timeout(local)

    @contextmanager
    def _within_timeout(self, local: dict[str, Any]) -> Iterator[Connection]:
        self.checkpoint()
        if self.application_name is not None:
            local = {"application_name": self.application_name, **local}
        try:
            with self.database.transaction(timeout=self.time_left(), **local) as connection:
                yield connection
        except StatementTimeout:
            if self.time_left() <= timedelta(milliseconds=50):
                raise self.timed_out() from None
            raise
