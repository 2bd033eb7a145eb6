"""The runs of this process: kept alive in the ledger, watched, asked to stop, and recorded when they end."""

import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta

from catfeeder_cron.config import JobSettings
from catfeeder_cron.errors import CatfeederCronError, DatabaseError, DatabaseUnavailable, JobAborted, JobInterrupted
from catfeeder_cron.ledger import DEAD_AFTER_SECONDS, HEARTBEAT_SECONDS, Ledger, Retries
from catfeeder_cron.logs import get_logger
from catfeeder_cron.report import JobReport
from catfeeder_cron.run_control import RunControl
from catfeeder_cron.scheduler.downtime import Downtime
from catfeeder_cron.scheduler.listeners import Listeners, Run
from catfeeder_cron.times import elapsed_seconds

log = get_logger("catfeeder_cron.scheduler")

# A run that does not end this long after its timeout is stuck, and told of again this often. A callable that does not
# end has been killed by then.
_STUCK_AFTER = timedelta(seconds=15)
_STUCK_TOLD_EVERY = timedelta(minutes=5)
_FORGET_EVERY_SECONDS = 3600
_NEVER = float("-inf")

TAKEN_FOR_DEAD = "this process was taken for dead, and the run was closed by another"
_CLOSED = "what runs the jobs of this process is closed"
ANSWER_LOST = "the database was cut off while the run was claimed"


@dataclass(frozen=True)
class Ended:
    """A run that has ended, and that is to be recorded."""

    run_id: int
    report: JobReport
    retries: Retries | None = None


class Supervisor:
    """Keeps a heartbeat going in a thread of its own from `start` to `close`, and tells `listeners` what happens.

    All methods may be called from any thread.
    """

    def __init__(self, ledger: Ledger, downtime: Downtime, history_keep: timedelta, listeners: Listeners) -> None:
        self._ledger = ledger
        self._downtime = downtime
        self._history_keep = history_keep
        self._listeners = listeners
        self._changed = threading.Condition()
        self._runs: list[Run] = []
        self._claiming = 0
        self._unrecorded: list[Ended] = []
        self._strays: set[int] = set()
        self._stop_reason: JobInterrupted | None = None
        self._closing = False
        self._wake = threading.Event()
        self._beating = threading.Lock()
        self._recording = threading.Lock()
        self._last_beat = _NEVER
        self._next_forget = elapsed_seconds()
        self._complaint = ""
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
            return sorted(run.job_id for run in self._runs if run.control.overdue() >= _STUCK_AFTER)

    @property
    def stopping(self) -> bool:
        """Whether every run was asked to end, and none may begin."""
        return self._stop_reason is not None

    def start(self) -> None:
        """Begin the heartbeats, the first of them at once. Idempotent; does nothing after `close`."""
        with self._changed:
            if self._thread is None and not self._closing:
                self._thread = threading.Thread(target=self._watch, name="heartbeat", daemon=True)
                self._thread.start()

    def begin(
        self, job_id: str, settings: JobSettings, control: RunControl, claim: Callable[[], int | None]
    ) -> Run | None:
        """Watch over the run that `claim` gets; None when it gets none.

        Raises the reason for the stop once one was requested, and DatabaseUnavailable where the others may take this
        process for dead and can't be told otherwise: they would close the run at once.
        """
        with self._changed:
            if self._stop_reason:
                raise self._stop_reason
            self._claiming += 1
        run: Run | None = None
        try:
            self._confirm()
            self._record()  # a run of the same job that has ended must not be in the way
            run_id = claim()
            if run_id is None:
                return None
            run = Run(run_id, job_id, settings, control)
            self._watch_over(run)
        except DatabaseUnavailable:
            self._downtime.missed()
            raise
        except BaseException as error:
            if run is not None:
                self.end(run, _aborted(run, f"the program was interrupted by {type(error).__name__}"))
            raise
        finally:
            with self._changed:
                self._claiming -= 1
                self._changed.notify_all()
        return run

    def begun(self, run: Run) -> None:
        """Tell that a run has begun."""
        self._listeners.tell(lambda listener: listener.began(run))

    def end(self, run: Run, report: JobReport, retries: Retries | None = None) -> None:
        """Record how a run ended: now, or as soon as the database can be reached. The first report counts."""
        with self._changed:
            if run not in self._runs:
                return
            self._runs.remove(run)
            self._unrecorded.append(Ended(run.run_id, report, retries))
            self._changed.notify_all()
        self._tell_ended(run, report)
        try:
            self._record()
        except DatabaseError as error:
            log.warning("run_not_recorded_yet", job=report.job, run_id=run.run_id, reason=str(error))

    def request_stop(self, reason: JobInterrupted) -> None:
        """Ask every run to end after the batch in hand, those that begin later too."""
        with self._changed:
            self._stop_reason = self._stop_reason or reason
            for run in self._runs:
                run.control.stop.set(self._stop_reason)

    def wait(self, timeout_seconds: float | None = None) -> None:
        """Return when no run is left, or so many seconds have passed."""
        with self._changed:
            self._changed.wait_for(lambda: not self._runs and not self._claiming, timeout_seconds)

    def beat(self) -> None:
        """Tell the others that this process lives; learn which of its runs they have closed.

        Raises DatabaseError, and JobInterrupted after `close`: a process that has left the list must not come back.
        """
        with self._beating:
            if self._closing:
                raise self._stop_reason or JobAborted(_CLOSED)
            with self._changed:
                before = list(self._runs)
                claiming = self._claiming
            begun = elapsed_seconds()
            try:
                if self._last_beat == _NEVER:
                    self._ledger.prepare()
                heartbeat = self._ledger.beat()
            except DatabaseUnavailable:
                self._downtime.missed()
                raise
            self._last_beat = begun
        for run in before:
            if run.run_id not in heartbeat.open_runs:
                run.control.stop.set(JobAborted(TAKEN_FOR_DEAD))
        for description in heartbeat.closed:
            log.warning("dead_run_closed", run=description)
        self._downtime.seen(datetime.now(UTC))
        self._record()
        self._close_strays(set() if claiming else heartbeat.open_runs)
        self._listeners.tell(lambda listener: listener.beat(True), pass_on=CatfeederCronError)
        for job, retry_in in heartbeat.retries.items():
            self._tell_retry(job, retry_in)

    def close(self, abandoned: str | None = None) -> None:
        """End the heartbeats. Runs that are `abandoned` (for this reason) are recorded as aborted."""
        with self._changed:  # either `start` has made the thread by now, or it makes none any more
            self._closing = True
        self._wake.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout=HEARTBEAT_SECONDS)
        with self._changed:
            runs, self._runs = self._runs, []
            ended = [(run, _aborted(run, abandoned or ANSWER_LOST)) for run in runs]
            self._unrecorded += [Ended(run.run_id, report) for run, report in ended]
        for run, report in ended:
            self._tell_ended(run, report)
        if self._last_beat > _NEVER:
            try:
                self._record()
                self._ledger.leave()
            except DatabaseError as error:
                if self._unrecorded:  # otherwise only our row among the living is left, which grows old by itself
                    log.warning("runs_not_recorded", runs=len(self._unrecorded), reason=str(error))

    def _watch(self) -> None:
        next_beat = elapsed_seconds()
        while not self._closing:
            if elapsed_seconds() >= next_beat:
                next_beat = elapsed_seconds() + HEARTBEAT_SECONDS
                if not self._try_to_beat():
                    self._listeners.tell(lambda listener: listener.beat(False))
            next_timeout = self._look_at_timeouts()
            self._wake.wait(max(0.0, min(next_beat - elapsed_seconds(), next_timeout)))
            self._wake.clear()

    def _try_to_beat(self) -> bool:
        """Beat, and now and then forget what is old; say once why that can't be done."""
        try:
            self.beat()
            if elapsed_seconds() >= self._next_forget:
                self._next_forget = elapsed_seconds() + _FORGET_EVERY_SECONDS
                self._forget()
        except (DatabaseUnavailable, JobInterrupted):
            return False  # told by the database itself, once; closed meanwhile
        except CatfeederCronError as error:
            if str(error) != self._complaint:
                self._complaint = str(error)
                log.error("heartbeat_failed", reason=self._complaint)
            return False
        except Exception:
            log.exception("heartbeat_failed")
            return False
        self._complaint = ""
        return True

    def _watch_over(self, run: Run) -> None:
        run.control.confirm = self._confirm
        run.control.start_clock()
        with self._changed:
            self._runs.append(run)
            if self._stop_reason:
                run.control.stop.set(self._stop_reason)
        if run.control.timeout.total_seconds() < HEARTBEAT_SECONDS:
            self._wake.set()

    def _tell_ended(self, run: Run, report: JobReport) -> None:
        self._listeners.tell(lambda listener: listener.ended(run, report))

    def _tell_retry(self, job_id: str, retry_in: timedelta) -> None:
        self._listeners.tell(lambda listener: listener.retry(job_id, retry_in))

    def _forget(self) -> None:
        while not self._closing and self._ledger.forget(self._history_keep):
            pass

    def _confirm(self) -> None:
        """Beat before a batch when the others are about to take this process for dead, as after a freeze."""
        if elapsed_seconds() - self._last_beat > 0.7 * DEAD_AFTER_SECONDS:
            self.beat()

    def _record(self) -> None:
        with self._recording:
            while self._unrecorded:
                ended = self._unrecorded[0]
                run_id, report = ended.run_id, ended.report
                try:
                    closed = self._ledger.close(run_id, report, ended.retries)
                except DatabaseUnavailable:
                    raise
                except Exception as error:  # noqa: BLE001 - counts that are no numbers, say
                    # Told again it would be refused again, and hold up every claim behind it.
                    log.error("report_not_recorded", job=report.job, run_id=run_id, reason=str(error))
                    bare = replace(report, reason="its report could not be recorded; see the log", counts={})
                    closed = self._ledger.close(run_id, bare, ended.retries)
                self._unrecorded.pop(0)
                if closed.retry_in is not None:
                    self._tell_retry(report.job, closed.retry_in)
                if closed.by_another:
                    log.warning("run_was_closed_by_another", job=report.job, run_id=run_id, outcome=report.outcome)

    def _close_strays(self, open_runs: set[int]) -> None:
        """Close runs that were claimed for this process, but whose number never arrived here."""
        with self._changed:
            strays = open_runs - {run.run_id for run in self._runs} - {each.run_id for each in self._unrecorded}
        for run_id in strays & self._strays:
            self._ledger.close(run_id, _report("", ANSWER_LOST, {}, timedelta(0)))
        self._strays = strays

    def _look_at_timeouts(self) -> float:
        """Ask runs to stop whose time is used up, tell of those that don't; return in how many seconds one is next."""
        with self._changed:
            runs = list(self._runs)
        for run in runs:
            overdue = run.control.overdue()
            if overdue >= timedelta(0):
                run.control.time_out()
            if overdue >= _STUCK_AFTER:
                self._tell_stuck(run, overdue)
        ahead = [-run.control.overdue().total_seconds() for run in runs if not run.control.stop]
        return max(0.0, min(ahead, default=float("inf")))

    def _tell_stuck(self, run: Run, overdue: timedelta) -> None:
        if run.stuck_told_at is None:
            self._listeners.tell(lambda listener: listener.stuck(run))
        if run.stuck_told_at is None or overdue - run.stuck_told_at >= _STUCK_TOLD_EVERY:
            run.stuck_told_at = overdue
            log.error("job_stuck", job=run.job_id, run_id=run.run_id, overdue_seconds=round(overdue.total_seconds()))


def _aborted(run: Run, reason: str) -> JobReport:
    return _report(run.job_id, reason, dict(run.control.counts), run.control.elapsed())


def _report(job_id: str, reason: str, counts: dict[str, int], duration: timedelta) -> JobReport:
    return JobReport(job_id, "aborted", reason, counts, datetime.now(UTC) - duration, duration, dry_run=False)
