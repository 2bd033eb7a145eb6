"""Claims slots, records runs and closes the runs of dead processes, in PostgreSQL.

Every method but `prepare` and `become_daemon` is one statement, which PostgreSQL carries out whole or not at all,
however its caller ends. All use the server's clock. Any number of processes may call them at once.
"""

from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from psycopg.types.json import Jsonb

from catfeeder_cron.database import Database, schema
from catfeeder_cron.database.lineage import Lineage
from catfeeder_cron.ledger import statements
from catfeeder_cron.ledger.backends import Backends
from catfeeder_cron.ledger.constants import (
    DEAD_AFTER_SECONDS,
    DIED,
    EARLY_SECONDS,
    HEARTBEAT_SECONDS,
    SETTLE_LEAST_SECONDS,
    SETTLE_SECONDS,
    SILENCE_SECONDS,
    STILL_RUNNING,
)
from catfeeder_cron.ledger.lineage_watch import LineageWatch
from catfeeder_cron.ledger.records import (
    Closed,
    Heartbeat,
    Missed,
    OpenRun,
    Process,
    Retries,
    RunRecord,
    SlotClaim,
    Trigger,
)
from catfeeder_cron.report import JobReport
from catfeeder_cron.times import timestamp

_EARLY = timedelta(seconds=EARLY_SECONDS)
# Ten seconds after the heartbeat before: so an outage is told within fifteen.
_BEAT_WITHIN_SECONDS = 4.5


class Ledger:
    """The ledger of one database, for one process. All methods may be called from any thread."""

    def __init__(self, database: Database, process: Process, state_directory: Path | None = None) -> None:
        self._database = database
        self._process = process
        self.backends = Backends(database, process)
        self._lineage = LineageWatch(state_directory)
        self._lifeline = database.lifeline(_BEAT_WITHIN_SECONDS)

    def prepare(self) -> None:
        """Create or upgrade the ledger's tables where that is needed. Raises DatabaseError."""
        schema.ensure(self._database)
        ((identity,),) = self._database.query(statements.IDENTITY, {})
        self._lineage.recall(identity)

    def become_daemon(self) -> None:
        """Be listed as a daemon from the next heartbeat on."""
        self._process = replace(self._process, kind="daemon")

    def register(self, triggers: dict[str, str], disabled: list[str]) -> dict[str, datetime]:
        """Open an account for every enabled job (`triggers` has their descriptions), close those of disabled jobs.

        Returns until when the slots of each enabled job are accounted for: those of a new one until now.
        """
        parameters = {
            "jobs": list(triggers),
            "triggers": list(triggers.values()),
            "disabled": disabled,
            "early": _EARLY,
        }
        return dict(self._database.query(statements.REGISTER, parameters))

    def claim(
        self,
        job: str,
        described: str,
        known: datetime,
        slot: datetime,
        missed: list[Missed],
        trigger: Trigger | None,
        *,
        shared: bool = False,
        grows: bool = True,
    ) -> SlotClaim:
        """Account for the slots of `job` up to `slot`, if they were accounted for until `known`.

        The slots in between were `missed`. Of all processes that try, one may run the slot; of a shared job each may,
        once. Without a `trigger` no process runs it, and `missed` covers the slot itself. With `grows` the first of
        them is joined to a stretch that was missed before for the same reason. If the answer lies before the slot,
        another process has changed the account: try again.
        """
        parameters = {
            "job": job,
            "described": described,
            "known": known,
            "slot": slot,
            "firsts": [stretch.slots.first for stretch in missed],
            "lasts": [stretch.slots.last for stretch in missed],
            "counts": [stretch.slots.count for stretch in missed],
            "reasons": [stretch.reason for stretch in missed],
            "trigger": trigger,
            "shared": shared,
            "grows": grows,
            "still_running": STILL_RUNNING,
        }
        ((accounted_until, run_id, too_early, wait_seconds),) = self._database.query(
            statements.CLAIM, self._process.parameters() | known_history(self._database) | parameters
        )
        return SlotClaim(accounted_until or known, run_id, too_early, wait_seconds)

    def claim_manual(self, job: str, *, shared: bool) -> int | None:
        """Claim a run outside the schedule; None when the job is running already, or the database just went back."""
        return _claim(self._database, self._process, job, "manual", shared=shared)

    def claim_woken(self, job: str, *, shared: bool) -> int | None:
        """Claim a run between the slots; None when the job is paused, or running already."""
        return _claim(self._database, self._process, job, "schedule", shared=shared)

    def claim_retry(self, job: str) -> int | None:
        """Claim the retry of a failed run; None if it is not due or taken, or the job runs or is paused."""
        parameters = self._process.parameters() | known_history(self._database) | {"job": job, "shared": False}
        rows = self._database.query(statements.CLAIM_RETRY, parameters)
        return rows[0][0] if rows else None

    def settles_in(self) -> float | None:
        """Return in how many seconds runs may begin again after the database went back; None if they may."""
        rows = self._database.query(statements.UNSETTLED, known_history(self._database) | {"shared": False})
        return rows[0][0] if rows else None

    def under_way(self, job: str) -> tuple[str, int, datetime] | None:
        """Return host, pid and start of the run of `job` that keeps this process from running it."""
        rows = self._database.query(statements.UNDER_WAY, self._process.parameters() | {"job": job})
        return rows[0] if rows else None

    def close(self, run_id: int, report: JobReport, retries: Retries | None = None) -> Closed:
        """Record how a run of this process ended, and schedule a retry if it failed and `retries` says so.

        Consecutive runs between slots that succeed become one row per hour: `runs` says how many, the counts are their
        sums. A report without a job closes the run whichever its job is.
        """
        parameters = _outcome(self._process, run_id, report) | {
            "job": report.job or None,
            "retries": retries.most if retries else 0,
            "retry_after": retries.after if retries else timedelta(0),
            "retry_before": retries.before if retries else None,
        }
        ((vanished, by_another, retry_in),) = self._database.query(statements.CLOSE, parameters)
        return Closed(vanished, by_another, retry_in)

    def restore(self, run: RunRecord) -> bool:
        """Record a run of this process anew if the ledger has lost it; return whether it had.

        The call may be repeated: what was recorded anew is not lost.
        """
        lost = "recorded again, because the database had lost it"
        of_slot = f" (slot {timestamp(run.slot)})" if run.slot else ""
        parameters = _outcome(self._process, run.run_id, run.report) | {
            "reason": "; ".join(filter(None, [run.report.reason, lost + of_slot])),
            "job": run.report.job,
            "slot": run.slot,
            "trigger": run.trigger,
            "shared": run.shared,
            "started_at": run.report.started_at,
            "duration": run.report.duration,
        }
        return self._database.execute(statements.RESTORE, parameters) > 0

    def beat(self, runs: Sequence[OpenRun] = ()) -> Heartbeat:
        """Tell the other processes that this one lives, and close the open runs of dead ones.

        `runs` are those of this process that are under way: one whose record was lost gets another one.

        It has a connection of its own: long statements of jobs may hold all others. Raises DatabaseUnavailable within
        4.5 seconds, whatever the network or the server does; the heartbeat may have arrived then.
        """
        parameters: dict[str, Any] = {
            "died": DIED,
            "dead_after": timedelta(seconds=DEAD_AFTER_SECONDS),
            "heartbeat": timedelta(seconds=HEARTBEAT_SECONDS),
            "silence": timedelta(seconds=SILENCE_SECONDS),
            "early": _EARLY,
            "run_ids": [run.run_id for run in runs],
            "jobs": [run.job for run in runs],
            "slots": [run.slot for run in runs],
            "triggers": [run.trigger for run in runs],
            "shareds": [run.shared for run in runs],
            "ages": [run.age for run in runs],
        }
        parameters |= self._process.parameters() | self._lineage.parameters()
        (row,) = self._lifeline.query(statements.BEAT, parameters)
        open_runs, closed, retries, working, reopened, server_now, *lineage = row
        before = self._database.lineage
        self._database.lineage = after = self._lineage.heard(Lineage(*lineage))
        return Heartbeat(
            set(open_runs),
            closed,
            {job: timedelta(seconds=max(0.0, seconds)) for job, seconds in (retries or {}).items()},
            {int(pid): described for pid, described in (working or {}).items()},
            server_now,
            after,
            before is not None and before.id != after.id,
            reopened or {},
        )

    def leave(self) -> None:
        """Remove this process from the list of the living ones."""
        self._database.execute(statements.LEAVE, self._process.parameters())
        self._lineage.close()

    def disconnect(self) -> None:
        """Close the connection for heartbeats; a later one raises DatabaseUnavailable. Idempotent."""
        self._lifeline.close()

    def forget(self, keep: timedelta) -> int:
        """Delete up to 5,000 runs older than `keep`, failures after three times as long; return how many."""
        return self._database.execute(statements.FORGET, {"keep": keep})


def known_history(database: Database) -> dict[str, Any]:
    """Return the parameters of the condition that the database is the one that this process knows."""
    lineage = database.lineage
    known = lineage.parameters() if lineage else {"lineage": None, "lineage_counter": 0}
    return known | {
        "settle": timedelta(seconds=SETTLE_SECONDS),
        "settle_least": timedelta(seconds=SETTLE_LEAST_SECONDS),
        "dead_after": timedelta(seconds=DEAD_AFTER_SECONDS),
        "early": _EARLY,
    }


def _outcome(process: Process, run_id: int, report: JobReport) -> dict[str, Any]:
    return process.parameters() | {
        "run_id": run_id,
        "outcome": report.outcome,
        "reason": report.reason,
        "error": report.reason if report.outcome == "failed" else None,
        "counts": Jsonb(report.counts),
    }


def _claim(database: Database, process: Process, job: str, trigger: Trigger, *, shared: bool) -> int | None:
    run = {"job": job, "trigger": trigger, "shared": shared}
    parameters = process.parameters() | known_history(database) | run
    rows = database.query(statements.CLAIM_WITHOUT_SLOT, parameters)
    return rows[0][0] if rows else None
