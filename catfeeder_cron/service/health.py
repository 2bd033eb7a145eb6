"""Judge the daemon's health: a summary for `systemctl status`, and the problems for liveness and readiness checks."""

import textwrap
import time
from datetime import timedelta

from catfeeder_cron.database import Database
from catfeeder_cron.ledger.snapshot import Snapshot
from catfeeder_cron.scheduler.crons import Crons

# How many turns of the scheduler's loop may be late before it counts as stalled.
_LATE_TURNS = 3
_MOST_NAMED = 3
_LONGEST_TROUBLE = 200


class Health:
    """Reads the state of the daemon's parts when it is asked. All methods may be called from any thread."""

    def __init__(self, crons: Crons, database: Database, turn_every: timedelta) -> None:
        self._crons = crons
        self._database = database
        self._turn_every = turn_every
        # Written by the scheduler's and the stop's thread, read by any; each is one value, so there is no lock.
        self._last_turn = time.monotonic()
        self._stopping = False

    def turned(self) -> None:
        """Record that the scheduler's loop has just turned."""
        self._last_turn = time.monotonic()

    def stopping(self) -> None:
        """Record that the daemon is stopping and starts no further run."""
        self._stopping = True

    def summary(self) -> str:
        """Return one line with the problems, the running jobs and the next slot."""
        if self._stopping:
            running = self._crons.running
            return f"stopping; waiting for {_listed(running)}" if running else "stopping"
        return "; ".join([*self._troubles(), self._running(), self._next()])

    def liveness_problems(self) -> list[str]:
        """Return the reasons why the process should be restarted; none if it is alive."""
        age = time.monotonic() - self._last_turn
        if not self._stopping and age > _LATE_TURNS * self._turn_every.total_seconds():
            return [f"the schedule's loop has not turned for {age:.0f} s"]
        return []

    def readiness_problems(self, snapshot: Snapshot) -> list[str]:
        """Return the reasons why jobs don't run as they should; none if the daemon is ready."""
        reasons = [f"{job} is stuck: it runs on though its timeout is over" for job in self._crons.stuck]
        reasons += self._crons.troubles
        if self._stopping:
            reasons.append("the daemon is stopping")
        if snapshot.trouble:
            what = "the ledger can't be read" if snapshot.reachable else "the database is unreachable"
            return [f"{what}: {snapshot.trouble}", *reasons]
        now = self._crons.now
        for job, schedule in self._crons.schedules.items():
            account = snapshot.accounts.get(job)
            slots = schedule.between(account.accounted_until, now) if account and account.accounted_until else None
            # The third slot that no daemon has recorded comes two intervals after the first.
            if slots and slots.count > 2:
                reasons.append(f"{job} is overdue since {slots.first.isoformat(timespec='seconds')}")
        return reasons

    def _troubles(self) -> list[str]:
        stuck = [f"STUCK: {_listed(self._crons.stuck)}"] if self._crons.stuck else []
        trouble = _shortened(self._database.trouble)
        others = [_shortened(f"TROUBLE: {each}") for each in self._crons.troubles]
        return [*([f"DATABASE UNREACHABLE: {trouble}"] if trouble else []), *others, *stuck]

    def _running(self) -> str:
        running = self._crons.running
        return f"running {_listed(running)}" if running else "idle"

    def _next(self) -> str:
        now = self._crons.now
        following = {job: schedule.next_after(now) for job, schedule in self._crons.schedules.items()}
        slots = sorted((slot, job) for job, slot in following.items() if slot)
        if not slots:
            return "no job is scheduled"
        slot, job = slots[0]
        return f"next {job} at {slot:%Y-%m-%d %H:%M:%S} UTC ({len(slots)} scheduled)"


def _shortened(trouble: str) -> str:
    return textwrap.shorten(trouble, _LONGEST_TROUBLE, placeholder=" ...")


def _listed(jobs: list[str]) -> str:
    more = len(jobs) - _MOST_NAMED
    return ", ".join(jobs[:_MOST_NAMED]) + (f" and {more} more" if more > 0 else "")
