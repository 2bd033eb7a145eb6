"""Collect what `list` and `status` show: the configured jobs, and the daemons that run them."""

from datetime import UTC, datetime, timedelta
from typing import Any

from catfeeder_cron.config import Settings
from catfeeder_cron.database import Database
from catfeeder_cron.errors import ConfigurationError, DatabaseError, PermissionDenied, SchemaProblem
from catfeeder_cron.ledger import DEAD_AFTER_SECONDS, pauses
from catfeeder_cron.ledger.history import last_runs
from catfeeder_cron.ledger.pauses import ALL_JOBS, JobPause
from catfeeder_cron.logs import get_logger
from catfeeder_cron.times import timestamp

log = get_logger("catfeeder_cron.console")

LISTED = ("job", "enabled", "trigger", "next_run", "last_run", "last_outcome", "paused")
"""The keys of a job in `list --json`; `status --json` has further ones."""

# A slot that no daemon has claimed this long after its time is overdue.
_OVERDUE_AFTER = timedelta(seconds=60)

_DAEMONS = """
    SELECT d.daemon::text, d.kind, d.host, d.pid, d.version, d.started_at, d.heartbeat_at,
           d.heartbeat_at > now() - %(dead_after)s AS alive,
           coalesce((SELECT jsonb_agg(jsonb_build_object(
                                'job', r.job, 'run_id', r.run_id,
                                'seconds', round(extract(epoch FROM now() - r.started_at)::numeric, 1))
                            ORDER BY r.run_id)
                     FROM catfeeder_cron.job_runs r WHERE r.daemon = d.daemon AND r.outcome IS NULL), '[]') AS running
    FROM catfeeder_cron.daemons d WHERE d.kind = 'daemon' OR d.heartbeat_at > now() - %(dead_after)s
    ORDER BY d.host, d.started_at"""
_ACCOUNTS = "SELECT job, trigger, accounted_until FROM catfeeder_cron.schedule"


def jobs(settings: Settings) -> list[dict[str, Any]]:
    """Return a JSON object for every configured job. Without a database or a ledger, past runs and pauses are empty."""
    runs, paused = _past(settings)
    return [_described(job_id, settings, runs, paused) for job_id in settings.jobs]


def status(settings: Settings, database: Database) -> dict[str, Any]:
    """Return a JSON object with the daemons on this database, and every job's pause, last run and delay."""
    rows = database.query(_DAEMONS, {"dead_after": timedelta(seconds=DEAD_AFTER_SECONDS)})
    daemons = [
        {
            "daemon": daemon,
            "kind": kind,
            "host": host,
            "pid": pid,
            "version": version,
            "started_at": timestamp(started_at),
            "heartbeat_at": timestamp(heartbeat_at),
            "alive": alive,
            "running": running,
        }
        for daemon, kind, host, pid, version, started_at, heartbeat_at, alive, running in rows
    ]
    runs, paused = last_runs(database, list(settings.jobs)), pauses.in_force(database)
    accounts = {job: (trigger, accounted_until) for job, trigger, accounted_until in database.query(_ACCOUNTS, {})}
    described = []
    for job_id, job in settings.jobs.items():
        schedule = settings.schedule(job_id)
        trigger, accounted_until = accounts.get(job_id, (None, None))
        due = datetime.now(UTC) - job.jitter - _OVERDUE_AFTER
        overdue = job.enabled and trigger == schedule.describe() and schedule.between(accounted_until, due)
        described.append(
            {
                **_described(job_id, settings, runs, paused),
                "overdue_since": timestamp(overdue.first) if overdue else None,
            }
        )
    return {"daemons": daemons, "jobs": described}


def _past(settings: Settings) -> tuple[dict[str, tuple[datetime, str | None]], list[JobPause]]:
    if settings.database.url_file_was_absent:
        log.warning("last_runs_unknown", reason=f"{settings.database.url_file} is not there, or not for you to read")
        return {}, []
    try:
        with Database(settings.database) as database:
            return last_runs(database, list(settings.jobs)), pauses.in_force(database)
    except (DatabaseError, ConfigurationError) as error:
        # Before `init-db` there is no ledger.
        if not isinstance(error, SchemaProblem) or isinstance(error, PermissionDenied):
            log.warning("last_runs_unknown", reason=str(error))
    return {}, []


def _described(
    job_id: str, settings: Settings, runs: dict[str, tuple[datetime, str | None]], paused: list[JobPause]
) -> dict[str, Any]:
    job = settings.jobs[job_id]
    schedule = settings.schedule(job_id)
    last_run, last_outcome = runs.get(job_id, (None, None))
    pause = _pause_of(job_id, paused)
    return {
        "job": job_id,
        "enabled": job.enabled,
        "trigger": schedule.describe(),
        "next_run": timestamp(schedule.next_after(datetime.now(UTC))) if job.enabled else None,
        "last_run": timestamp(last_run),
        "last_outcome": last_outcome if last_outcome or last_run is None else "running",
        "paused": pause is not None,
        "paused_until": timestamp(pause.until) if pause else None,
        "paused_because": pause.because if pause else None,
        "paused_at": timestamp(pause.paused_at) if pause else None,
        "paused_by": pause.host if pause else None,
    }


def _pause_of(job_id: str, paused: list[JobPause]) -> JobPause | None:
    """Return the job's own pause, else the pause of all jobs, if there is one."""
    by_job = {pause.job: pause for pause in paused}
    return by_job.get(job_id) or by_job.get(ALL_JOBS)
