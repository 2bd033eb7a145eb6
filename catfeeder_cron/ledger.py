"""What ran, what did not and why: slots are claimed, runs recorded and dead processes' runs closed in PostgreSQL.

Every method is one statement, which PostgreSQL carries out whole or not at all however its caller ends. They agree on
the server's clock. Any number of processes may call them at once.
"""

import os
import platform
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Any, Literal
from uuid import UUID, uuid4

from psycopg.types.json import Jsonb

from catfeeder_cron import __version__
from catfeeder_cron.database import Database
from catfeeder_cron.job import JobReport
from catfeeder_cron.schedule import Slots

HEARTBEAT_SECONDS = 10
# Three missed heartbeats.
DEAD_AFTER_SECONDS = 30

Trigger = Literal["schedule", "manual", "catch_up"]

DIED = "its process died or lost the database"
STILL_RUNNING = "still running"
NO_DAEMON = "no daemon alive"
NO_DATABASE = "database unreachable"
NO_WORKER = "no worker was free"


@dataclass(frozen=True)
class Process:
    """Who we are to the others: a new identity for every process, since host names and pids come again."""

    kind: Literal["daemon", "run-once"]
    daemon: UUID = field(default_factory=uuid4)
    host: str = field(default_factory=platform.node)
    pid: int = field(default_factory=os.getpid)

    def parameters(self) -> dict[str, Any]:
        return {"daemon": self.daemon, "kind": self.kind, "host": self.host, "pid": self.pid, "version": __version__}


@dataclass(frozen=True)
class Claim:
    """What came of claiming a slot.

    `advanced`: this process accounts for the slot, and for those since `previous`. `run_id`: it may run the job;
    None with `advanced`: it may not, because the job is still running, or `paused` (in words).
    """

    advanced: bool
    previous: datetime | None
    run_id: int | None
    paused: str | None


# One row of `schedule` serves as the lock: who moves it past the slot has claimed it.
_CLAIM = """
    WITH advanced AS (
        INSERT INTO catfeeder_cron.schedule AS s (job, trigger, accounted_until)
        VALUES (%(job)s, %(described)s, %(slot)s)
        ON CONFLICT (job) DO UPDATE SET accounted_until = excluded.accounted_until, previous = s.accounted_until
        WHERE s.accounted_until < excluded.accounted_until
        RETURNING previous),
    paused AS (
        SELECT 'paused' || coalesce(': ' || because, '') AS reason FROM catfeeder_cron.pauses
        WHERE job IN (%(job)s, '*') AND (until IS NULL OR until > now()) ORDER BY job DESC LIMIT 1),
    claimed AS (
        INSERT INTO catfeeder_cron.job_runs (job, slot, trigger, shared, host, pid, daemon)
        SELECT %(job)s, %(slot)s, %(trigger)s, %(shared)s, %(host)s, %(pid)s, %(daemon)s
        WHERE %(run)s AND NOT EXISTS (SELECT FROM paused) AND (%(shared)s OR EXISTS (SELECT FROM advanced))
        ON CONFLICT DO NOTHING
        RETURNING run_id)
    SELECT EXISTS (SELECT FROM advanced), (SELECT previous FROM advanced), (SELECT run_id FROM claimed),
           (SELECT reason FROM paused)"""

_CLAIM_MANUAL = """
    INSERT INTO catfeeder_cron.job_runs (job, trigger, shared, host, pid, daemon)
    VALUES (%(job)s, 'manual', %(shared)s, %(host)s, %(pid)s, %(daemon)s)
    ON CONFLICT DO NOTHING
    RETURNING run_id"""

# Of a run between the slots. A pause holds it as it holds those of the schedule.
_CLAIM_WOKEN = """
    INSERT INTO catfeeder_cron.job_runs (job, trigger, shared, host, pid, daemon)
    SELECT %(job)s, 'schedule', %(shared)s, %(host)s, %(pid)s, %(daemon)s
    WHERE NOT EXISTS (SELECT FROM catfeeder_cron.pauses
                      WHERE job IN (%(job)s, '*') AND (until IS NULL OR until > now()))
    ON CONFLICT DO NOTHING
    RETURNING run_id"""

_UNDER_WAY = """
    SELECT host, pid, started_at FROM catfeeder_cron.job_runs WHERE job = %(job)s AND outcome IS NULL AND NOT shared"""

_CLOSE = """
    UPDATE catfeeder_cron.job_runs
    SET outcome = %(outcome)s, reason = %(reason)s, error = %(error)s, counts = %(counts)s, finished_at = now()
    WHERE run_id = %(run_id)s AND outcome IS NULL"""

# A stretch grows while the reason stays the same. Repeated, it changes nothing.
_MISS = """
    WITH grown AS (
        UPDATE catfeeder_cron.job_runs SET last_slot = %(last)s, missed = missed + %(missed)s, finished_at = now()
        WHERE job = %(job)s AND last_slot = %(previous)s AND reason = %(reason)s
        RETURNING run_id)
    INSERT INTO catfeeder_cron.job_runs
        (job, slot, last_slot, missed, trigger, outcome, reason, host, pid, daemon, finished_at)
    SELECT %(job)s, %(first)s, %(last)s, %(missed)s, 'schedule', 'skipped', %(reason)s, %(host)s, %(pid)s, %(daemon)s,
           now()
    WHERE NOT EXISTS (SELECT FROM grown)
    ON CONFLICT DO NOTHING"""

# After a restart of the server nobody has been heard of for a while, so nobody is taken for dead until everybody had
# the time to come back.
_BEAT = """
    WITH beat AS (
        INSERT INTO catfeeder_cron.daemons AS d (daemon, kind, host, pid, version)
        VALUES (%(daemon)s, %(kind)s, %(host)s, %(pid)s, %(version)s)
        ON CONFLICT (daemon) DO UPDATE SET heartbeat_at = now(), kind = excluded.kind),
    closed AS (
        UPDATE catfeeder_cron.job_runs r
        SET outcome = 'aborted', reason = %(died)s, finished_at = now()
        WHERE r.outcome IS NULL AND r.daemon <> %(daemon)s
          AND pg_postmaster_start_time() < now() - %(dead_after)s
          AND NOT EXISTS (SELECT FROM catfeeder_cron.daemons d
                          WHERE d.daemon = r.daemon AND d.heartbeat_at > now() - %(dead_after)s)
        RETURNING r.job, r.host, r.pid, r.run_id),
    gone AS (
        DELETE FROM catfeeder_cron.daemons d
        WHERE d.heartbeat_at < now() - interval '1 day' AND d.daemon <> %(daemon)s)
    SELECT array(SELECT run_id FROM catfeeder_cron.job_runs WHERE outcome IS NULL AND daemon = %(daemon)s),
           array(SELECT format('%%s (run %%s on %%s, pid %%s)', job, run_id, host, pid) FROM closed)"""

_LEAVE = "DELETE FROM catfeeder_cron.daemons WHERE daemon = %(daemon)s"

# A changed trigger starts a new account: the slots it would have had before were never due.
_REGISTER = """
    WITH dropped AS (DELETE FROM catfeeder_cron.schedule WHERE job = ANY(%(disabled)s)),
    registered AS (
        INSERT INTO catfeeder_cron.schedule AS s (job, trigger, accounted_until)
        SELECT job, trigger, now() FROM unnest(%(jobs)s::text[], %(triggers)s::text[]) AS new(job, trigger)
        ON CONFLICT (job) DO UPDATE SET trigger = excluded.trigger, accounted_until = excluded.accounted_until
        WHERE s.trigger <> excluded.trigger)
    SELECT s.job, s.accounted_until FROM catfeeder_cron.schedule s
    JOIN unnest(%(jobs)s::text[], %(triggers)s::text[]) AS new(job, trigger) USING (job, trigger)"""

_FORGET = """
    DELETE FROM catfeeder_cron.job_runs WHERE ctid = ANY (ARRAY(
        SELECT ctid FROM catfeeder_cron.job_runs
        WHERE outcome IS NOT NULL AND started_at < now() - %(keep)s
          AND (outcome NOT IN ('failed', 'aborted', 'timed_out') OR started_at < now() - 3 * %(keep)s)
        LIMIT 5000 FOR UPDATE SKIP LOCKED))"""


class Ledger:
    """The ledger of one database, as seen by one process."""

    def __init__(self, database: Database, process: Process) -> None:
        self._database = database
        self._process = process

    def become_daemon(self) -> None:
        """Be listed as a daemon from the next heartbeat on."""
        self._process = replace(self._process, kind="daemon")

    def register(self, triggers: dict[str, str], disabled: list[str]) -> dict[str, datetime]:
        """Open an account for every enabled job (its trigger in words by its id), close that of a disabled one.

        Returns until when the slots of those that had an account are accounted for; a job that is missing is new.
        """
        parameters = {"jobs": list(triggers), "triggers": list(triggers.values()), "disabled": disabled}
        return dict(self._database.query(_REGISTER, parameters))

    def claim(
        self, job: str, described: str, slot: datetime, trigger: Trigger, *, shared: bool = False, run: bool = True
    ) -> Claim:
        """Claim a slot. Of all processes that try, one may run it; of a shared job each may, once.

        With `run` False nobody runs it: the caller only accounts for it.
        """
        parameters = {
            "job": job,
            "described": described,
            "slot": slot,
            "trigger": trigger,
            "shared": shared,
            "run": run,
        }
        (row,) = self._database.query(_CLAIM, self._process.parameters() | parameters)
        return Claim(*row)

    def claim_manual(self, job: str, *, shared: bool) -> int | None:
        """Claim a run outside the schedule; None when the job is running already."""
        rows = self._database.query(_CLAIM_MANUAL, self._process.parameters() | {"job": job, "shared": shared})
        return rows[0][0] if rows else None

    def claim_woken(self, job: str, *, shared: bool) -> int | None:
        """Claim a run between the slots; None when the job is paused, or running already."""
        rows = self._database.query(_CLAIM_WOKEN, self._process.parameters() | {"job": job, "shared": shared})
        return rows[0][0] if rows else None

    def under_way(self, job: str) -> tuple[str, int, datetime] | None:
        """Return host, pid and start of the run of `job` that is under way."""
        rows = self._database.query(_UNDER_WAY, {"job": job})
        return rows[0] if rows else None

    def close(self, run_id: int, report: JobReport) -> bool:
        """Record how a run ended. False when somebody else has closed it, having taken this process for dead."""
        parameters = {
            "run_id": run_id,
            "outcome": report.outcome,
            "reason": report.reason,
            "error": report.reason if report.outcome == "failed" else None,
            "counts": Jsonb(report.counts),
        }
        return self._database.execute(_CLOSE, parameters) == 1

    def miss(self, job: str, slots: Slots, previous: datetime | None, reason: str) -> None:
        """Account for slots that did not run; `previous` is the slot before them."""
        parameters = {
            "job": job,
            "first": slots.first,
            "last": slots.last,
            "missed": slots.count,
            "previous": previous,
            "reason": reason,
        }
        self._database.execute(_MISS, self._process.parameters() | parameters)

    def beat(self) -> tuple[set[int], list[str]]:
        """Say that this process lives, and close what dead ones left open.

        Returns the runs of this process that are open (one that was thought to be is not, when somebody closed it),
        and in words what was closed.
        """
        parameters = {"died": DIED, "dead_after": timedelta(seconds=DEAD_AFTER_SECONDS)}
        ((open_runs, closed),) = self._database.query(_BEAT, self._process.parameters() | parameters)
        return set(open_runs), closed

    def leave(self) -> None:
        """Take this process off the list of the living."""
        self._database.execute(_LEAVE, self._process.parameters())

    def forget(self, keep: timedelta) -> int:
        """Delete up to 5,000 runs older than `keep`, failures after three times as long; return how many."""
        return self._database.execute(_FORGET, {"keep": keep})
