"""Delete verification codes that were never used: the expired rows of "Verification"."""

from datetime import timedelta
from types import MappingProxyType

from catfeeder_cron.config import Duration
from catfeeder_cron.database.catalog import WantedIndex
from catfeeder_cron.database.requirements import TableUse
from catfeeder_cron.expired_rows import ExpiredRowsSettings, delete_expired
from catfeeder_cron.job import Job, JobContext


class CleanVerification(ExpiredRowsSettings):
    """[jobs.clean-verification]."""

    web_server_keys = MappingProxyType({"clean_verification": "enabled", "clean_verification_interval": "interval"})
    interval: Duration | None = timedelta(seconds=900)


def run(context: JobContext, settings: CleanVerification) -> None:
    """Delete the codes whose `expiration` has passed."""
    delete_expired(context, context.tables.verification, "expiration", settings)


JOB = Job(
    id="clean-verification",
    summary="delete expired verification codes",
    settings=CleanVerification,
    run=run,
    tables=(TableUse("verification", ("SELECT", "UPDATE", "DELETE"), (), times=("expiration",), by_leaf=True),),
    wanted_indexes=(WantedIndex("verification", "expiration"),),
)
