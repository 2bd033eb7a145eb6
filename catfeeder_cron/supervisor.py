"""The runs of this process: kept alive in the ledger, watched, asked to stop, and recorded when they end."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from catfeeder_cron.errors import CatfeederCronError, DatabaseError, DatabaseUnavailable, JobAborted, JobInterrupted
from catfeeder_cron.job import JobContext, JobReport
from catfeeder_cron.ledger import DEAD_AFTER_SECONDS, HEARTBEAT_SECONDS, Ledger
from catfeeder_cron.logs import get_logger
from catfeeder_cron.presence import Presence

log = get_logger(__name__)

# A run that does not end this long after its timeout is stuck, and told of again this often.
_STUCK_AFTER = timedelta(seconds=10)
_STUCK_TOLD_EVERY = timedelta(minutes=5)
_FORGET_EVERY_SECONDS = 3600
_NEVER = float("-inf")

TAKEN_FOR_DEAD = "this process was taken for dead, and the run was closed by another"
ANSWER_LOST = "the database was cut off while the run was claimed"


def _elapsed() -> float:
    """Seconds on a clock that goes on while the machine is suspended, which the monotonic one does not."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


@dataclass(eq=False)
class Run:
    run_id: int
    job_id: str
    context: JobContext
    stuck_told_at: timedelta | None = field(default=None)


class Supervisor:
    """Keeps a heartbeat going in a thread of its own from `start` to `close`.

    `prepare` is called before the first heartbeat, until it raises nothing; `on_return` after the first one, and after
    each that follows an outage of the database or a freeze of this process; `on_stuck` once for each run that does
    not end when it should. `on_change` is called with the report of every run that ends, and with None when one begins
    and after every heartbeat; it must neither block nor raise.
    """

    def __init__(
        self,
        ledger: Ledger,
        presence: Presence,
        history_keep: timedelta,
        prepare: Callable[[], None],
        on_return: Callable[[], None],
        on_stuck: Callable[[], None],
        on_change: Callable[[JobReport | None], None],
    ) -> None:
        self._ledger = ledger
        self._presence = presence
        self._history_keep = history_keep
        self._prepare = prepare
        self._on_return = on_return
        self._on_stuck = on_stuck
        self._on_change = on_change
        self._changed = threading.Condition()
        self._runs: list[Run] = []
        self._unrecorded: list[tuple[int, JobReport]] = []
        self._strays: set[int] = set()
        self._stop_reason: JobInterrupted | None = None
        self._closing = threading.Event()
        self._beating = threading.Lock()
        self._recording = threading.Lock()
        self._last_beat = _NEVER
        self._thread: threading.Thread | None = None

    @property
    def running(self) -> list[str]:
        """The ids of the jobs that are running."""
        with self._changed:
            return sorted(run.job_id for run in self._runs)

    @property
    def stuck(self) -> list[str]:
        """The ids of the jobs that run on long after they should have ended."""
        with self._changed:
            return sorted(run.job_id for run in self._runs if run.context.overdue() >= _STUCK_AFTER)

    def start(self) -> None:
        """Begin the heartbeats, the first of them at once. Idempotent."""
        with self._changed:
            if self._thread is None:
                self._thread = threading.Thread(target=self._watch, name="heartbeat", daemon=True)
                self._thread.start()

    def begin(self, run_id: int, job_id: str, context: JobContext) -> Run:
        """Watch over a run that was claimed."""
        run = Run(run_id, job_id, context)
        context.confirm = self._confirm
        with self._changed:
            self._runs.append(run)
            if self._stop_reason:
                context.stop.set(self._stop_reason)
        self._on_change(None)
        return run

    def end(self, run: Run, report: JobReport) -> None:
        """Record how a run ended: now, or as soon as the database can be reached."""
        with self._changed:
            self._runs.remove(run)
            self._unrecorded.append((run.run_id, report))
            self._changed.notify_all()
        self._on_change(report)
        try:
            self._record()
        except DatabaseError as error:
            log.warning("run_not_recorded_yet", job=report.job, run_id=run.run_id, reason=str(error))

    def request_stop(self, reason: JobInterrupted) -> None:
        """Ask every run to end after the batch in hand, those that begin later too."""
        with self._changed:
            self._stop_reason = self._stop_reason or reason
            for run in self._runs:
                run.context.stop.set(self._stop_reason)

    def wait(self) -> None:
        """Return when no run is left."""
        with self._changed:
            self._changed.wait_for(lambda: not self._runs)

    def beat(self) -> None:
        """Tell the others that this process lives; learn which of its runs they have closed. Raises DatabaseError."""
        with self._beating:
            with self._changed:
                before = list(self._runs)
            begun = _elapsed()
            try:
                if self._last_beat == _NEVER:
                    self._prepare()
                open_runs, closed = self._ledger.beat()
            except DatabaseUnavailable:
                self._presence.missed()
                raise
            self._last_beat = begun
        for run in before:
            if run.run_id not in open_runs:
                run.context.stop.set(JobAborted(TAKEN_FOR_DEAD))
        for description in closed:
            log.warning("dead_run_closed", run=description)
        self._record()
        self._close_strays(open_runs)
        self._presence.seen(datetime.now(UTC))
        if self._presence.take_return():
            self._on_return()

    def close(self, abandoned: str | None = None) -> None:
        """End the heartbeats. Runs that are `abandoned` (for this reason) are recorded as aborted."""
        self._closing.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout=HEARTBEAT_SECONDS)
        with self._changed:
            runs, self._runs = self._runs, []
            self._unrecorded += [(run.run_id, _aborted(run, abandoned or ANSWER_LOST)) for run in runs]
        if self._last_beat > _NEVER:
            try:
                self._record()
                self._ledger.leave()
            except DatabaseError as error:
                log.warning("runs_not_recorded", reason=str(error))

    def _watch(self) -> None:
        next_forget = _elapsed() + _FORGET_EVERY_SECONDS
        complaint = ""
        while not self._closing.is_set():
            try:
                self.beat()
                if _elapsed() > next_forget:
                    while self._ledger.forget(self._history_keep) and not self._closing.is_set():
                        pass
                    next_forget = _elapsed() + _FORGET_EVERY_SECONDS
            except DatabaseUnavailable:
                pass  # told by the database itself, once
            except CatfeederCronError as error:
                if str(error) != complaint:
                    complaint = str(error)
                    log.error("heartbeat_failed", reason=complaint)
            except Exception:
                log.exception("heartbeat_failed")
            self._tell_stuck_runs()
            self._on_change(None)
            self._closing.wait(HEARTBEAT_SECONDS)

    def _confirm(self) -> None:
        """Beat before a batch when the others are about to take this process for dead, as after a freeze."""
        if _elapsed() - self._last_beat > 0.7 * DEAD_AFTER_SECONDS:
            self.beat()

    def _record(self) -> None:
        with self._recording:
            while self._unrecorded:
                run_id, report = self._unrecorded[0]
                closed_by_us = self._ledger.close(run_id, report)
                self._unrecorded.pop(0)
                if not closed_by_us:
                    log.warning("run_was_closed_by_another", job=report.job, run_id=run_id, outcome=report.outcome)

    def _close_strays(self, open_runs: set[int]) -> None:
        """Close runs that were claimed for this process, but whose number never arrived here."""
        with self._changed:
            strays = open_runs - {run.run_id for run in self._runs} - {run_id for run_id, _ in self._unrecorded}
        for run_id in strays & self._strays:
            self._ledger.close(run_id, _report("", ANSWER_LOST, {}, timedelta(0)))
        self._strays = strays

    def _tell_stuck_runs(self) -> None:
        with self._changed:
            runs = list(self._runs)
        for run in runs:
            overdue = run.context.overdue()
            if overdue < _STUCK_AFTER:
                continue
            if run.stuck_told_at is None:
                self._on_stuck()
            if run.stuck_told_at is None or overdue - run.stuck_told_at >= _STUCK_TOLD_EVERY:
                run.stuck_told_at = overdue
                log.error(
                    "job_stuck", job=run.job_id, run_id=run.run_id, overdue_seconds=round(overdue.total_seconds())
                )


def _aborted(run: Run, reason: str) -> JobReport:
    return _report(run.job_id, reason, dict(run.context.counts), run.context.timeout + run.context.overdue())


def _report(job_id: str, reason: str, counts: dict[str, int], duration: timedelta) -> JobReport:
    return JobReport(job_id, "aborted", reason, counts, datetime.now(UTC) - duration, duration, dry_run=False)
