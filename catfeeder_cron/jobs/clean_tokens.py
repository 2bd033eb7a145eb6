"""Log users out whose session has expired: delete the expired rows of "Connections"."""

from datetime import timedelta
from types import MappingProxyType

from catfeeder_cron.config import Duration
from catfeeder_cron.database.catalog import WantedIndex
from catfeeder_cron.database.requirements import TableUse
from catfeeder_cron.expired_rows import ExpiredRowsSettings, delete_expired
from catfeeder_cron.job import Job, JobContext


class CleanTokens(ExpiredRowsSettings):
    """[jobs.clean-tokens]."""

    web_server_keys = MappingProxyType({"clean_tokens": "enabled", "clean_tokens_interval": "interval"})
    interval: Duration | None = timedelta(seconds=1800)


def run(context: JobContext, settings: CleanTokens) -> None:
    """Delete the sessions whose `expiration_date` has passed."""
    delete_expired(context, context.tables.connections, "expiration_date", settings)


JOB = Job(
    id="clean-tokens",
    summary="delete expired session tokens",
    settings=CleanTokens,
    run=run,
    tables=(TableUse("connections", ("SELECT", "UPDATE", "DELETE"), (), times=("expiration_date",), by_leaf=True),),
    wanted_indexes=(WantedIndex("connections", "expiration_date"),),
)
