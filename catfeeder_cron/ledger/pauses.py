"""Pauses jobs, for all daemons and across restarts.

The statement that claims a slot reads the pauses itself, so a pause is in force for every daemon as soon as it is
committed.
"""

import platform
from dataclasses import dataclass
from datetime import datetime, timedelta

from catfeeder_cron.database import Database
from catfeeder_cron.logs import one_line

ALL_JOBS = "*"  # no job's id

_PAUSE = """
    INSERT INTO catfeeder_cron.pauses (job, until, because, host)
    SELECT DISTINCT job, now() + %(duration)s::interval, %(because)s, %(host)s
    FROM unnest(%(jobs)s::text[]) AS paused(job)
    ON CONFLICT (job) DO UPDATE
    SET until = excluded.until, because = excluded.because, host = excluded.host, paused_at = now()"""

_RESUME = """
    WITH ended AS (DELETE FROM catfeeder_cron.pauses WHERE %(all)s OR job = ANY(%(jobs)s) RETURNING job, until)
    SELECT job FROM ended WHERE until IS NULL OR until > now() ORDER BY job"""

_IN_FORCE = """
    SELECT job, until, because, paused_at, host FROM catfeeder_cron.pauses
    WHERE until IS NULL OR until > now() ORDER BY job"""


@dataclass(frozen=True)
class JobPause:
    """A pause of `job` (ALL_JOBS: of every one); without `until` it lasts until it is ended."""

    job: str
    until: datetime | None
    because: str | None
    paused_at: datetime
    host: str


def pause(database: Database, jobs: list[str], duration: timedelta | None, because: str | None) -> None:
    """Pause these jobs, all of them where none is named; replace their earlier pauses.

    Runs that are under way go on. Slots that come up in a pause are accounted for as paused.
    """
    reason = one_line(because) if because else None
    parameters = {"jobs": jobs or [ALL_JOBS], "duration": duration, "because": reason, "host": platform.node()}
    database.execute(_PAUSE, parameters)


def resume(database: Database, jobs: list[str]) -> list[str]:
    """End the pauses of these jobs, or all; return the jobs whose pauses were in force."""
    return [job for (job,) in database.query(_RESUME, {"jobs": jobs, "all": not jobs})]


def in_force(database: Database) -> list[JobPause]:
    """Return the pauses that are in force, in the order of their jobs' ids."""
    return [JobPause(*row) for row in database.query(_IN_FORCE, {})]
