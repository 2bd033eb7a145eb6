"""Run the due rows of "Actions", each by the handler of its kind."""

from datetime import timedelta
from types import MappingProxyType
from typing import Annotated

from pydantic import Field, field_validator

from catfeeder_cron.actions import built_in
from catfeeder_cron.actions.due.leases import count_due, due_in_seconds
from catfeeder_cron.actions.due.tables import ActionTables
from catfeeder_cron.config import Duration, JobSettings, within
from catfeeder_cron.database.catalog import WantedIndex
from catfeeder_cron.database.requirements import TableUse
from catfeeder_cron.errors import JobSkipped
from catfeeder_cron.imports import load
from catfeeder_cron.job import Job, JobContext, Wake

_SECOND = timedelta(seconds=1)


class CheckActions(JobSettings):
    """[jobs.check-actions]."""

    web_server_keys = MappingProxyType({"check_actions_interval": "interval"})
    interval: Duration | None = timedelta(seconds=300)
    concurrency: int = Field(default=8, ge=1, le=100)
    """How many actions one process performs at the same time."""
    action_timeout: Annotated[Duration, within(_SECOND)] = timedelta(seconds=30)
    """How long one attempt may take. A stop waits for it, within `shutdown_grace`."""
    retry_after: Duration = timedelta(seconds=10)
    """The pause before the second attempt; before each further attempt it doubles."""
    lease: Annotated[Duration, within(_SECOND)] = timedelta(seconds=60)
    """How long other daemons may not claim an action; extended while its handler runs."""

    @field_validator("enabled")
    @classmethod
    def _never_off(cls, enabled: bool) -> bool:
        if not enabled:
            raise ValueError("true: this job is always enabled, `catfeeder-cron pause` holds it")
        return enabled


def run(context: JobContext, settings: CheckActions) -> None:
    """Run the due actions; any number of daemons may do this at the same time.

    Counts `due` (claimed by this run), `done`, `retried` (another attempt will follow) and `given_up`; a dry run
    counts `would_run`.
    """
    load("catfeeder_cron.actions.due.run")
    from catfeeder_cron.actions.due.run import DueActionsRun, Limits

    with context.transaction() as connection:
        tables = ActionTables.find(connection, context.tables, context.database.naive_timestamps)
        if tables is None:  # dropped since the run's tables were checked
            raise JobSkipped(f'there is no table "{context.tables.actions}" any more')
        if context.dry_run:
            context.counts["would_run"] = count_due(connection, tables)
            return
    context.counts.update(due=0, done=0, retried=0, given_up=0)
    limits = Limits(settings.concurrency, settings.lease, settings.action_timeout, settings.retry_after)
    DueActionsRun(context, tables, context.resources.actions, built_in(), limits).work()


def recover(context: JobContext) -> None:
    """Store the outcomes that this process remembers and the database has lost, or has not got in an outage."""
    load("catfeeder_cron.actions.due.run")
    from catfeeder_cron.actions.due.run import recover

    with context.transaction() as connection:
        tables = ActionTables.find(connection, context.tables, context.database.naive_timestamps)
    if tables is not None:
        recover(context, tables, CheckActions().lease)


def due_in(context: JobContext) -> float | None:
    """Return in how many seconds the next action is due or a lease ends; None if there is neither."""
    with context.transaction() as connection:
        tables = ActionTables.find(connection, context.tables, context.database.naive_timestamps)
        return due_in_seconds(connection, tables) if tables else None


JOB = Job(
    id="check-actions",
    summary="run the actions that are due",
    settings=CheckActions,
    run=run,
    shared=True,
    irreversible=True,
    tables=(
        TableUse(
            "actions",
            ("SELECT", "UPDATE"),
            ("id", "user_id", "name", "kind", "payload", "repeat_every", "state", "lease_owner", "last_error"),
            times=("due_at", "lease_until"),
            numbers=("attempts", "max_attempts"),
            optional=True,
        ),
        TableUse(
            "action_log",
            ("INSERT",),
            ("action_id", "outcome", "detail"),
            times=("started_at", "finished_at"),
            numbers=("attempt",),
            optional=True,
        ),
    ),
    wanted_indexes=(
        WantedIndex("actions", "due_at", state="pending"),
        WantedIndex("actions", "lease_until", state="running"),
    ),
    recover=recover,
    wake=Wake("catfeeder_cron_actions", due_in),
)
