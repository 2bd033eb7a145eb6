"""Reads past runs and missed slots from the ledger."""

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from catfeeder_cron.database import Database
from catfeeder_cron.times import timestamp

_RUNS = """
    SELECT run_id, job, slot, last_slot, missed, trigger, outcome, reason, counts, started_at, finished_at, host, pid,
           daemon, runs
    FROM catfeeder_cron.job_runs
    WHERE %(job)s::text IS NULL OR job = %(job)s
    ORDER BY run_id DESC LIMIT %(limit)s"""

# One step into an index for each job, however long the history is.
_LAST = """
    SELECT job, started_at, outcome FROM unnest(%(jobs)s::text[]) AS each(job), LATERAL (
        SELECT started_at, outcome FROM catfeeder_cron.job_runs r
        WHERE r.job = each.job AND missed IS NULL ORDER BY run_id DESC LIMIT 1) last"""

_DURATIONS = """
    SELECT job, count(*), percentile_cont(0.5) WITHIN GROUP (ORDER BY finished_at - started_at),
           max(finished_at - started_at)
    FROM catfeeder_cron.job_runs
    WHERE outcome = 'succeeded' AND runs = 1 AND (%(job)s::text IS NULL OR job = %(job)s) GROUP BY job ORDER BY job"""

# Each of the two columns is one step into an index, however long the history is.
_ACCOUNTS = """
    SELECT job, s.accounted_until,
           (SELECT r.finished_at FROM catfeeder_cron.job_runs r
            WHERE r.job = wanted.job AND r.outcome = 'succeeded' ORDER BY r.run_id DESC LIMIT 1)
    FROM unnest(%(jobs)s::text[]) AS wanted(job) LEFT JOIN catfeeder_cron.schedule s USING (job)"""


@dataclass(frozen=True)
class PastRun:
    """A run, finished or under way; `runs` between slots; or a stretch of `missed` slots that did not run."""

    run_id: int
    job: str
    slot: datetime | None
    last_slot: datetime | None
    missed: int | None
    trigger: str
    outcome: str | None
    reason: str | None
    counts: dict[str, int]
    started_at: datetime
    finished_at: datetime | None
    host: str
    pid: int
    daemon: UUID
    runs: int

    @property
    def duration(self) -> timedelta | None:
        """The time from start to end; None while the run is under way, and for missed slots."""
        return None if self.missed or self.finished_at is None else self.finished_at - self.started_at

    def as_json(self) -> dict[str, Any]:
        """Return the fields of one line of `history --json`."""
        return {
            "run_id": self.run_id,
            "job": self.job,
            "slot": timestamp(self.slot),
            "trigger": self.trigger,
            "outcome": self.outcome,
            "reason": self.reason,
            "counts": self.counts,
            "started_at": timestamp(self.started_at),
            "duration_seconds": None if self.duration is None else round(self.duration.total_seconds(), 3),
            "dry_run": False,
            "host": self.host,
            "pid": self.pid,
            "daemon": str(self.daemon),
            "first_slot": timestamp(self.slot) if self.missed else None,
            "last_slot": timestamp(self.last_slot),
            "missed": self.missed,
            **({"runs": self.runs} if self.runs > 1 else {}),
        }


@dataclass(frozen=True)
class Account:
    """Until when all slots of a job are accounted for, and the end of its last run that succeeded."""

    accounted_until: datetime | None
    last_success: datetime | None


@dataclass(frozen=True)
class Durations:
    """How long the succeeded runs of a job took, as far back as the history goes."""

    job: str
    runs: int
    median: timedelta
    longest: timedelta


def past_runs(database: Database, job: str | None, limit: int) -> list[PastRun]:
    """Return the last runs and missed stretches of one job or of all, newest first, up to `limit`."""
    rows = database.query(_RUNS, {"job": job, "limit": limit})
    return [PastRun(*row) for row in rows]


def durations(database: Database, job: str | None) -> list[Durations]:
    """Return the durations of one job or of all, in the order of their ids."""
    return [Durations(*row) for row in database.query(_DURATIONS, {"job": job})]


def accounts(database: Database, jobs: list[str], timeout: timedelta) -> dict[str, Account]:
    """Return the account of every job in `jobs`, all daemons' runs included."""
    with database.transaction(timeout=timeout) as connection:
        return {job: Account(*rest) for job, *rest in connection.execute(_ACCOUNTS, {"jobs": jobs})}


def last_runs(database: Database, jobs: list[str]) -> dict[str, tuple[datetime, str | None]]:
    """Return start and outcome (None while under way) of the last run of each of these jobs that has run."""
    return {job: (started_at, outcome) for job, started_at, outcome in database.query(_LAST, {"jobs": jobs})}
