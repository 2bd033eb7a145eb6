"""What a job is, and what it is given for a run."""

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
    """What has a job run between its slots, so that these are no more than its safety net."""

    channel: str
    """The PostgreSQL channel on which news are told."""
    due_in: Callable[["JobContext"], float | None]
    """In how many seconds there is something to do; None while nothing is in sight."""


@dataclass(frozen=True)
class Job(Generic[S]):
    """A kind of work with its settings. `run` returns when all is done, and raises when it is not."""

    id: str
    summary: str
    settings: type[S]
    run: Callable[["JobContext", S], None]
    shared: bool = False
    """Its rows are shared out by leases, so every daemon works on each of its slots."""
    tables: tuple[TableUse, ...] = ()
    wanted_indexes: tuple[WantedIndex, ...] = ()
    wake: "Wake | None" = None
    recover: Callable[["JobContext"], None] | None = None
    """Finishes what a dead process or an outage has left half done; called when a daemon has found the database."""
    check: Callable[[Database, Settings, bool], Iterator[Finding]] | None = None
    """Finds what else stands in its way; it is told whether its tables are as it needs them.

    It may raise DatabaseUnavailable.
    """


@dataclass(kw_only=True)
class JobContext(RunControl):
    """What one run is given, beside what controls it."""

    database: Database
    tables: DatabaseTables
    dry_run: bool = False
    progress: Progress = no_progress
    schedule: Schedule | None = None
    """The job's slots."""
    slot: datetime | None = None
    """The one that this run is for; None for a run between them."""
    oauth: OAuthClient = field(default_factory=lambda: OAuthClient(OAuthSettings()))
    state_directory: Path = field(default_factory=state_directory)
    """Where the job may keep what must survive the process; it need not exist."""
    children: Children = field(default_factory=Children)
    """The processes for code of the operator's."""
    actions: ActionsSettings = field(default_factory=ActionsSettings)
    by_provider: dict[str, Counter[str]] = field(default_factory=dict)
    """The counts, for a job that works with OAuth providers, by their names."""
    provider_reasons: dict[str, str] = field(default_factory=dict)
    """Why there is something left to do at a provider."""

    def transaction(self, **local: str | int) -> AbstractContextManager[Connection]:
        """Like Database.transaction; a statement may take what is left of the job's time, and JobTimedOut ends it."""
        return self._within_timeout(local)

    @contextmanager
    def _within_timeout(self, local: dict[str, Any]) -> Iterator[Connection]:
        self.checkpoint()
        try:
            with self.database.transaction(timeout=self.time_left(), **local) as connection:
                yield connection
        except StatementTimeout:
            if self.time_left() <= timedelta(milliseconds=50):
                raise self.timed_out() from None
            raise
