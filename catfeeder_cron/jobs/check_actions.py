"""Run the due rows of "Actions", each by the handler of its kind."""

from datetime import timedelta
from types import MappingProxyType
from typing import Annotated

from pydantic import Field, field_validator

from catfeeder_cron.actions import built_in
from catfeeder_cron.actions.due.leases import count_due, due_in_seconds
from catfeeder_cron.config import Duration, JobSettings, within
from catfeeder_cron.database.catalog import WantedIndex, has_table
from catfeeder_cron.database.requirements import TableUse
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

    if context.dry_run:
        with context.transaction() as connection:
            context.counts["would_run"] = count_due(connection, context.tables)
        return
    context.counts.update(due=0, done=0, retried=0, given_up=0)
    limits = Limits(settings.concurrency, settings.lease, settings.action_timeout, settings.retry_after)
    DueActionsRun(context, context.resources.actions, built_in(), limits).work()


def due_in(context: JobContext) -> float | None:
    """Return in how many seconds the next action is due or a lease ends; None if there is neither."""
    with context.transaction() as connection:
        if not has_table(connection, context.tables.schema_, context.tables.actions):
            return None
        return due_in_seconds(connection, context.tables)


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
    wake=Wake("catfeeder_cron_actions", due_in),
)
