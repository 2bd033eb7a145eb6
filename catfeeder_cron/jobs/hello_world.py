"""A job for testing an installation: log a greeting."""

from datetime import timedelta
from types import MappingProxyType

from catfeeder_cron.config import Duration, JobSettings
from catfeeder_cron.job import Job, JobContext
from catfeeder_cron.logs import get_logger

log = get_logger("catfeeder_cron.jobs")


class HelloWorld(JobSettings):
    """[jobs.test-hello-world]."""

    web_server_keys = MappingProxyType(
        {"enable_test_crons": "enabled", "test_cron_interval": "interval", "test_crons_interval": "interval"}
    )
    enabled: bool = False
    interval: Duration | None = timedelta(seconds=200)


def run(context: JobContext, settings: HelloWorld) -> None:
    """Log a greeting."""
    log.info("hello_world", message="Hello, world!")


JOB = Job(id="test-hello-world", summary="log a greeting", settings=HelloWorld, run=run)
