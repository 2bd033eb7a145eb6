"""The runs of this process that the ledger has as open: under way, or ended and not recorded yet."""

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta

from catfeeder_cron.errors import JobInterrupted
from catfeeder_cron.ledger.records import Retries, RunRecord
from catfeeder_cron.report import JobReport
from catfeeder_cron.scheduler.listeners import Origin, Run
from catfeeder_cron.scheduler.server_clock import ServerClock
from catfeeder_cron.times import elapsed_seconds

# How many runs, and for how long, a process remembers for a ledger that loses its last seconds.
_REMEMBERED = 1000
_REMEMBERED_SECONDS = 3600


@dataclass(frozen=True, eq=False)
class EndedRun:
    """A run that has ended, and that is to be recorded."""

    run_id: int
    report: JobReport
    origin: Origin
    started_at: datetime
    """When it began, by the database's clock. It stays as it is: the ledger tells by it whether it has the run."""
    retries: Retries | None = None
    ended_at: float = field(default_factory=elapsed_seconds)

    def record(self) -> RunRecord:
        """Return what the ledger needs to record the run anew."""
        report = replace(self.report, started_at=self.started_at)
        return RunRecord(self.run_id, report, self.origin.slot, self.origin.trigger, self.origin.shared)


class OpenRuns:
    """Knows the open runs, those that are being claimed, and whether all were asked to stop.

    All methods may be called from any thread.
    """

    def __init__(self, clock: ServerClock) -> None:
        self._clock = clock
        # Held by any thread for the moment in which it reads or changes these fields, never while the database is asked
        # or a listener is called. Its holder may take it again: a signal's handler may ask for a stop at any point.
        self._changed = threading.Condition()
        self._under_way: list[Run] = []
        self._claiming = 0
        self._unrecorded: list[EndedRun] = []
        self._recorded: deque[EndedRun] = deque(maxlen=_REMEMBERED)
        self._stop_reason: JobInterrupted | None = None

    @property
    def under_way(self) -> list[Run]:
        """The runs that have not ended."""
        with self._changed:
            return list(self._under_way)

    @property
    def job_ids(self) -> list[str]:
        """The ids of the jobs that are running, in alphabetical order."""
        return sorted(run.job_id for run in self.under_way)

    @property
    def stop_reason(self) -> JobInterrupted | None:
        """Why every run was asked to end, and none may begin; None while none was asked."""
        return self._stop_reason

    @property
    def unrecorded(self) -> list[EndedRun]:
        """The runs that have ended and are not recorded yet, the oldest first."""
        with self._changed:
            return list(self._unrecorded)

    @contextmanager
    def claiming(self) -> Iterator[None]:
        """Inside the `with` block, let `wait` wait for a run that is being claimed. Raises the reason for a stop."""
        with self._changed:
            if self._stop_reason:
                raise self._stop_reason
            self._claiming += 1
        try:
            yield
        finally:
            with self._changed:
                self._claiming -= 1
                self._changed.notify_all()

    def seen_at_once(self) -> tuple[list[Run], bool]:
        """Return the runs under way and whether one more is being claimed, both as of the same moment."""
        with self._changed:
            return list(self._under_way), self._claiming > 0

    def add(self, run: Run) -> None:
        """Add a run that has been claimed. It is asked to stop if all were, even after it was claimed."""
        with self._changed:
            self._under_way.append(run)
            stop_reason = self._stop_reason
        if stop_reason:  # without the lock: this calls callbacks
            run.control.stop.set(stop_reason)

    def end(self, run: Run, report: JobReport, retries: Retries | None) -> bool:
        """Move a run to those that are to be recorded. Returns False for one that has ended before."""
        with self._changed:
            if run not in self._under_way:
                return False
            self._under_way.remove(run)
            self._unrecorded.append(_ended(run, report, self._clock, retries))
            self._changed.notify_all()
        return True

    def end_all(self, reason: str) -> list[tuple[Run, JobReport]]:
        """Have every run under way recorded as aborted for this reason; return the runs with their reports."""
        with self._changed:
            runs, self._under_way = self._under_way, []
            ended = [(run, aborted(run, reason)) for run in runs]
            self._unrecorded += [_ended(run, report, self._clock) for run, report in ended]
        return ended

    def renumber(self, run: Run, run_id: int) -> None:
        """Give a run that is under way the number of its new record; one that has ended keeps its own."""
        with self._changed:
            if run in self._under_way:
                run.run_id = run_id

    def recorded(self, ended: EndedRun) -> None:
        """Take a run off that the ledger has recorded, and remember it for an hour."""
        with self._changed:
            self._unrecorded.remove(ended)
            # Runs between slots become one row, so nothing tells a lost row from one that was taken in.
            if ended.origin.slot or ended.origin.trigger != "schedule":
                self._recorded.append(ended)

    def recorded_lately(self) -> list[EndedRun]:
        """Return the runs that were recorded within the last hour, a thousand at most, the oldest first."""
        with self._changed:
            return [ended for ended in self._recorded if elapsed_seconds() - ended.ended_at < _REMEMBERED_SECONDS]

    def unknown_of(self, run_ids: set[int]) -> set[int]:
        """Return which of these runs are none of the open ones."""
        with self._changed:
            return run_ids - {run.run_id for run in self._under_way} - {each.run_id for each in self._unrecorded}

    def request_stop(self, reason: JobInterrupted) -> None:
        """Ask every run to end after the batch in hand, also those that begin later. The first reason stays."""
        with self._changed:
            self._stop_reason = stop_reason = self._stop_reason or reason
            runs = list(self._under_way)
        for run in runs:  # without the lock: this calls callbacks
            run.control.stop.set(stop_reason)

    def wait(self, timeout_seconds: float | None = None) -> None:
        """Return when no run is under way or being claimed, or when so many seconds have passed."""
        with self._changed:
            self._changed.wait_for(lambda: not self._under_way and not self._claiming, timeout_seconds)


def _ended(run: Run, report: JobReport, clock: ServerClock, retries: Retries | None = None) -> EndedRun:
    return EndedRun(run.run_id, report, run.origin, report.started_at + clock.correction(), retries)


def aborted(run: Run, reason: str) -> JobReport:
    """Return the report of a run that is aborted now, with the counts of its work so far."""
    return aborted_report(run.job_id, reason, dict(run.control.counts), run.control.elapsed())


def aborted_report(job_id: str, reason: str, counts: dict[str, int], duration: timedelta) -> JobReport:
    """Return the report of an aborted run that ends now, after this duration."""
    return JobReport(job_id, "aborted", reason, counts, datetime.now(UTC) - duration, duration, dry_run=False)
