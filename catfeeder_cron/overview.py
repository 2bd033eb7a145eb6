"""What `list` shows of the configured jobs."""

from datetime import UTC, datetime
from typing import Any

from catfeeder_cron.config import Settings
from catfeeder_cron.database import Database
from catfeeder_cron.errors import ConfigurationError, DatabaseError, SchemaProblem
from catfeeder_cron.history import last_runs, timestamp
from catfeeder_cron.logs import get_logger
from catfeeder_cron.schedule import schedule_for

log = get_logger(__name__)


def jobs(settings: Settings) -> list[dict[str, Any]]:
    """Return a JSON object for every configured job. Without a database or a ledger, the last runs are unknown."""
    last_runs = _last_runs(settings)
    return [_describe(settings, job_id, *last_runs.get(job_id, (None, None))) for job_id in settings.jobs]


def _describe(settings: Settings, job_id: str, last_run: datetime | None, last_outcome: str | None) -> dict[str, Any]:
    job = settings.jobs[job_id]
    schedule = schedule_for(job_id, job, settings.scheduler.timezone)
    return {
        "job": job_id,
        "enabled": job.enabled,
        "trigger": schedule.describe(),
        "next_run": timestamp(schedule.next_after(datetime.now(UTC))) if job.enabled else None,
        "last_run": timestamp(last_run),
        "last_outcome": last_outcome if last_outcome or last_run is None else "running",
        "paused": False,
    }


def _last_runs(settings: Settings) -> dict[str, tuple[datetime, str | None]]:
    try:
        with Database(settings.database) as database:
            return last_runs(database, list(settings.jobs))
    except SchemaProblem:
        return {}  # before `init-db` there is no ledger
    except (DatabaseError, ConfigurationError) as error:
        log.warning("last_runs_unknown", reason=str(error))
        return {}
