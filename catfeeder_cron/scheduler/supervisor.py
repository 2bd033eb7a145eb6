"""Keeps the runs of this process alive in the ledger, and records how they end."""

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import TypeVar

from catfeeder_cron.config import JobSettings
from catfeeder_cron.errors import (
    CatfeederCronError,
    DatabaseError,
    DatabaseUnavailable,
    JobAborted,
    JobInterrupted,
)
from catfeeder_cron.ledger.constants import FENCE_GRACE_SECONDS, HEARTBEAT_SECONDS
from catfeeder_cron.ledger.ledger import Ledger
from catfeeder_cron.ledger.records import Heartbeat, Retries
from catfeeder_cron.logs import get_logger
from catfeeder_cron.report import JobReport
from catfeeder_cron.run_control import RunControl
from catfeeder_cron.scheduler import fence
from catfeeder_cron.scheduler.downtime import Downtime
from catfeeder_cron.scheduler.listeners import Listeners, Origin, Run
from catfeeder_cron.scheduler.open_runs import OpenRuns, aborted
from catfeeder_cron.scheduler.recorder import ANSWER_LOST, Recorder
from catfeeder_cron.scheduler.server_clock import ServerClock
from catfeeder_cron.scheduler.timeouts import Timeouts
from catfeeder_cron.times import elapsed_seconds

log = get_logger("catfeeder_cron.scheduler")

T = TypeVar("T")

_FORGET_EVERY_SECONDS = 3600
_AGAIN_SECONDS = 1.0
_NEVER = float("-inf")
# While the database is away, it is looked for this often.
_OUTAGE_SECONDS = 2.0
# A run confirms its heartbeat before a batch once it is this old: the fence is near.
_CONFIRM_AFTER_SECONDS = 15

TAKEN_FOR_DEAD = "this process was taken for dead, and the run was closed by another"
RECORD_LOST = "the database went back to a time before this run began"
RUNS_HERE = "the job was running in this process already"
_CLOSED = "what runs the jobs of this process is closed"


@dataclass(frozen=True)
class _Heard:
    """The answer to a heartbeat, and whether a run was being claimed when it was sent."""

    heartbeat: Heartbeat
    claiming: bool


class Supervisor:
    """Keeps a heartbeat going in a thread of its own from `start` to `close`, and tells `listeners` about each event.

    A second thread does what has to be done after a heartbeat and may wait for connections. A third one asks runs to
    end: those whose time is up, and all that may run nowhere else at the same time once no heartbeat has arrived for 20
    seconds (FENCE_SECONDS), because from 30 seconds on others may begin the job. It needs no database for that. `runs`
    are the open runs, `timeouts` ends them in time, `clock` shows the database's time. All methods may be called from
    any thread.
    """

    def __init__(
        self,
        ledger: Ledger,
        downtime: Downtime,
        history_keep: timedelta,
        listeners: Listeners,
        clock: ServerClock | None = None,
    ) -> None:
        self.clock = clock or ServerClock()
        self.runs = OpenRuns(self.clock)
        self.timeouts = Timeouts(self.runs, listeners)
        self.recorder = Recorder(ledger, self.runs, listeners)
        self._ledger = ledger
        self._downtime = downtime
        self._history_keep = history_keep
        self._listeners = listeners
        self._closing = False
        # What wakes the thread of the heartbeat, the one that ends runs, and the one that follows a heartbeat up.
        self._wake_heartbeat, self._wake_watch, self._wake_follower = (threading.Event() for _ in range(3))
        # Held while the threads are made and while the end is announced: none is made after that. Its holder may take
        # it again: a signal's handler may close this in the middle of a start.
        self._starting = threading.RLock()
        # Held during a heartbeat, by the heartbeat's thread or by one that begins or confirms a run: heartbeats come
        # one after the other, and none begins after the end was announced.
        self._beating = threading.Lock()
        self._last_beat = _NEVER
        self._next_forget = elapsed_seconds()
        self._logged_failures: dict[str, str] = {}
        # The latest answer that was not followed up yet: put in by one thread, taken out by another, each in one step.
        self._heard: deque[_Heard] = deque(maxlen=1)
        self._must_restore = False
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        """Begin the heartbeats, the first of them at once. Idempotent; does nothing after `close`."""
        with self._starting:
            if not self._threads and not self._closing:
                parts = {"heartbeat": self._beat_regularly, "watch": self._watch, "follow-up": self._follow}
                for name, work in parts.items():
                    self._threads.append(threading.Thread(target=work, name=name, daemon=True))
                    self._threads[-1].start()

    def begin(
        self,
        job_id: str,
        settings: JobSettings,
        control: RunControl,
        claim: Callable[[], int | None],
        origin: Origin = Origin(),  # noqa: B008 - it is frozen
    ) -> Run | None:
        """Begin to supervise the run that `claim` gets; return None when it gets none.

        Raises the reason for the stop once one was requested, and DatabaseUnavailable where the other processes may
        take this one for dead and no heartbeat can reach them: they would close the run at once.
        """
        run: Run | None = None
        try:
            with self.runs.claiming():
                self._confirm()
                self.recorder.record()  # a run of the same job that has ended must not be in the way
                run_id = claim()
                if run_id is None:
                    return None
                run = Run(run_id, job_id, settings, control, origin)
                if not origin.shared and job_id in self.runs.job_ids:
                    # Only a ledger that has lost the other run gives it a second one.
                    self._ledger.close(run_id, aborted(run, RUNS_HERE))
                    return None
                self._supervise(run)
        except DatabaseUnavailable:
            self._downtime.missed()
            raise
        except BaseException as error:
            if run is not None:
                self.end(run, aborted(run, f"the program was interrupted by {type(error).__name__}"))
            raise
        return run

    def begun(self, run: Run) -> None:
        """Tell the listeners that a run has begun."""
        self._listeners.began(run)

    def end(self, run: Run, report: JobReport, retries: Retries | None = None) -> None:
        """Record how a run ended: now, or as soon as the database can be reached. The first report counts."""
        if not self.runs.end(run, report, retries):
            return
        self._listeners.ended(run, report)
        try:
            self.recorder.record()
        except DatabaseError as error:
            log.warning("run_not_recorded_yet", job=report.job, run_id=run.run_id, reason=str(error))

    def beat(self) -> None:
        """Tell the other processes that this one lives; learn which of its runs they have closed.

        Raises DatabaseError, and JobInterrupted after `close`: a process that has left the list must not come back.
        """
        self._follow_up(self._exchange())

    def close(self, abandoned: str | None = None) -> None:
        """End the heartbeats. Runs that are `abandoned` (for this reason) are recorded as aborted."""
        with self._starting:  # either `start` has made the threads by now, or it makes none any more
            self._closing = True
        for wake in (self._wake_heartbeat, self._wake_watch, self._wake_follower):
            wake.set()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(timeout=HEARTBEAT_SECONDS)
        for run, report in self.runs.end_all(abandoned or ANSWER_LOST):
            self._listeners.ended(run, report)
        if self._last_beat > _NEVER:
            try:
                self.recorder.record()
                self._ledger.leave()
            except DatabaseError as error:
                # Otherwise only this process's row in the list of the living is left, which expires by itself.
                if unrecorded := self.runs.unrecorded:
                    log.warning("runs_not_recorded", runs=len(unrecorded), reason=str(error))
        self._ledger.disconnect()

    def _beat_regularly(self) -> None:
        """Send heartbeats, in the thread of the heartbeat; more often while none arrives.

        It waits for nothing but the heartbeat's own connection.
        """
        while not self._closing:
            next_beat = elapsed_seconds() + HEARTBEAT_SECONDS
            if heard := self._attempt("heartbeat_failed", self._exchange):
                self._heard.append(heard)
                self._wake_follower.set()
            else:
                self._listeners.beat(False)
                next_beat = elapsed_seconds() + _OUTAGE_SECONDS
            self._wake_heartbeat.wait(max(0.0, next_beat - elapsed_seconds()))
            self._wake_heartbeat.clear()

    def _follow(self) -> None:
        """Do what is to be done after a heartbeat, the latest, in a thread of its own: it may wait for connections."""
        while not self._closing:
            self._wake_follower.wait()
            self._wake_follower.clear()
            if self._heard:
                self._attempt("heartbeat_not_followed_up", partial(self._follow_up, self._heard.pop()))
                self._attempt("history_not_deleted", self._forget)

    def _forget(self) -> None:
        """Delete the old history every hour."""
        if elapsed_seconds() >= self._next_forget:
            self._next_forget = elapsed_seconds() + _FORGET_EVERY_SECONDS
            while not self._closing and self._ledger.forget(self._history_keep):
                pass

    def _watch(self) -> None:
        """End runs in time, in a thread of its own: nothing that it does waits for the database."""
        while not self._closing:
            try:
                look_in = min(self.timeouts.enforce(), fence.enforce(self.runs, self._last_beat))
            except Exception:  # of a callback that asks a run to stop
                log.exception("run_not_asked_to_end")
                look_in = _AGAIN_SECONDS
            self._wake_watch.wait(None if look_in == float("inf") else look_in)
            self._wake_watch.clear()

    def _exchange(self) -> _Heard:
        """Send a heartbeat; learn which runs are still this process's. Raises as `beat` does."""
        with self._beating:
            if self._closing:
                raise self.runs.stop_reason or JobAborted(_CLOSED)
            before, claiming = self.runs.seen_at_once()
            begun = elapsed_seconds()
            try:
                if self._last_beat == _NEVER:
                    self._ledger.prepare()
                heartbeat = self._ledger.beat([run.as_open() for run in before])
            except DatabaseUnavailable:
                self._downtime.missed()
                raise
            if heartbeat.server_now:
                self.clock.read(heartbeat.server_now, begun, elapsed_seconds())
            self._last_beat = begun
            self._downtime.seen(self.clock.now())
            self._must_restore = self._must_restore or heartbeat.went_back
        for run in before:
            if run.run_id in heartbeat.open_runs:
                fence.put_off(run, self._last_beat)
            elif run.job_id in heartbeat.reopened:
                self.recorder.go_on_as(run, heartbeat.reopened[run.job_id])
                fence.put_off(run, self._last_beat)
            else:
                reason = RECORD_LOST if heartbeat.went_back else TAKEN_FOR_DEAD
                run.control.stop.set(JobAborted(reason, FENCE_GRACE_SECONDS))
        for description in heartbeat.closed:
            log.warning("dead_run_closed", run=description)
        return _Heard(heartbeat, claiming)

    def _follow_up(self, heard: _Heard) -> None:
        """Record what has to be recorded, and tell the listeners."""
        heartbeat = heard.heartbeat
        self.recorder.end_backends(heartbeat.working)
        self.recorder.record()
        if self._must_restore:
            self._must_restore = False  # first: the next heartbeat may set it while this goes on
            try:
                self.recorder.restore()
            except DatabaseError:
                self._must_restore = True
                raise
        self.recorder.close_unanswered(set() if heard.claiming else heartbeat.open_runs)
        self._listeners.beat(True)
        for job, retry_in in heartbeat.retries.items():
            self._listeners.retry(job, retry_in)

    def _attempt(self, failure: str, work: Callable[[], T]) -> T | None:
        """Do this; where it can't be done, log why once, as the event `failure`, and return None."""
        try:
            done = work()
        except (DatabaseUnavailable, JobInterrupted):
            return None  # the database has logged its outage once; or this was closed meanwhile
        except CatfeederCronError as error:
            if str(error) != self._logged_failures.get(failure):
                self._logged_failures[failure] = str(error)
                log.error(failure, reason=str(error))
            return None
        except Exception:
            log.exception(failure)
            return None
        self._logged_failures.pop(failure, None)
        return done

    def _supervise(self, run: Run) -> None:
        run.control.confirm = self._confirm
        run.control.application_name = self._ledger.backends.name_for(run.run_id)
        fence.put_off(run, self._last_beat)
        run.control.start_clock()
        self.runs.add(run)
        self._wake_watch.set()

    def _confirm(self) -> None:
        """Beat before a batch when the others are about to take this process for dead, as after a freeze."""
        if elapsed_seconds() - self._last_beat > _CONFIRM_AFTER_SECONDS:
            self.beat()
