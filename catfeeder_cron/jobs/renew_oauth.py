"""Keep OAuth links alive: renew the access tokens of "ActiveOauths" that would end before the next run."""

from collections.abc import Iterator
from datetime import timedelta
from types import MappingProxyType

from catfeeder_cron.config import Duration, JobSettings, Settings
from catfeeder_cron.database import Database
from catfeeder_cron.database.catalog import WantedIndex
from catfeeder_cron.database.requirements import TableUse
from catfeeder_cron.imports import load
from catfeeder_cron.job import Job, JobContext
from catfeeder_cron.report import Finding


class RenewOAuth(JobSettings):
    """[jobs.renew-oauth]."""

    web_server_keys = MappingProxyType({"renew_oath_tokens": "enabled", "renew_oath_tokens_interval": "interval"})
    interval: Duration | None = timedelta(seconds=1800)


def run(context: JobContext, settings: RenewOAuth) -> None:
    """Renew the tokens that would end before the next run; any number of daemons may do this at the same time."""
    load("catfeeder_cron.renewal.run")
    from catfeeder_cron.renewal.run import renew_due  # asyncio takes 40 ms to import

    renew_due(context, settings.jitter)


def recover(context: JobContext) -> None:
    """Store the answers that dead processes have left, and delete the state of links that are gone."""
    load("catfeeder_cron.renewal.recovery")
    from catfeeder_cron.renewal import recovery

    recovery.recover(context)
    recovery.forget_deleted(context)


def tend(context: JobContext) -> None:
    """Delete old answers, and put answers back as long as other hosts wait for that after a failover."""
    load("catfeeder_cron.renewal.recovery")
    from catfeeder_cron.renewal import recovery

    recovery.tend(context)


def check(database: Database, settings: Settings, tables_are_right: bool) -> Iterator[Finding]:
    """Yield the findings about providers and the directory for their answers. Raises DatabaseUnavailable."""
    load("catfeeder_cron.renewal.checks")
    from catfeeder_cron.renewal.checks import check_links

    return check_links(JOB.id, database, settings, tables_are_right)


JOB = Job(
    id="renew-oauth",
    summary="renew OAuth tokens before they end",
    settings=RenewOAuth,
    run=run,
    shared=True,
    irreversible=True,
    tables=(
        TableUse(
            "active_oauths",
            ("SELECT", "UPDATE"),
            ("id", "token", "refresh_link", "service_id", "user_id"),
            instants=("token_expiration",),
            numbers=("token_lifespan",),
        ),
        TableUse("services", ("SELECT",), ("id", "name")),
        TableUse(
            "user_oauth_connection",
            ("SELECT",),
            ("id", "provider_name", "client_id", "client_secret", "token_grabber_base_url"),
        ),
    ),
    wanted_indexes=(WantedIndex("active_oauths", "token_expiration"),),
    recover=recover,
    tend=tend,
    check=check,
)
