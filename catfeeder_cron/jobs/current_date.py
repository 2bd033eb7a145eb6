"""A job for testing an installation: log the date and time."""

from datetime import UTC, datetime, timedelta
from types import MappingProxyType

from catfeeder_cron.config import Duration, JobSettings
from catfeeder_cron.job import Job, JobContext
from catfeeder_cron.logs import get_logger

log = get_logger("catfeeder_cron.jobs")


class CurrentDate(JobSettings):
    """[jobs.test-current-date]."""

    web_server_keys = MappingProxyType(
        {"enable_test_crons": "enabled", "test_cron_interval": "interval", "test_crons_interval": "interval"}
    )
    enabled: bool = False
    interval: Duration | None = timedelta(seconds=200)


def run(context: JobContext, settings: CurrentDate) -> None:
    """Log the date and time in UTC."""
    log.info("current_date", date=datetime.now(UTC).isoformat(timespec="seconds"))


JOB = Job(id="test-current-date", summary="log the date and time", settings=CurrentDate, run=run)
