"""Tells the listeners what happens to the runs of this process: pings, wakers, the status, the metrics, in one list."""

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from catfeeder_cron.config import JobSettings
from catfeeder_cron.errors import CatfeederCronError
from catfeeder_cron.ledger.records import OpenRun, Trigger
from catfeeder_cron.logs import get_logger
from catfeeder_cron.report import JobReport
from catfeeder_cron.run_control import RunControl, is_for_the_program

log = get_logger("catfeeder_cron.scheduler")


@dataclass(frozen=True)
class Origin:
    """Where a run came from. A `shared` job's run is no obstacle to runs of other processes."""

    slot: datetime | None = None
    trigger: Trigger = "manual"
    shared: bool = False


@dataclass(eq=False)
class Run:
    """A run of this process that the ledger knows, with the settings that it began with."""

    run_id: int
    job_id: str
    settings: JobSettings
    control: RunControl
    origin: Origin = field(default_factory=Origin)
    is_cut_off: bool = False
    """Whether it was asked to end because no heartbeat arrived any more."""
    stuck_reported_at: timedelta | None = None
    """How far it was beyond its timeout when it was last reported as stuck."""

    def as_open(self) -> OpenRun:
        """Return what a heartbeat tells of it."""
        origin = self.origin
        return OpenRun(self.run_id, self.job_id, origin.slot, origin.trigger, origin.shared, self.control.elapsed())


class RunListener:
    """Base class of the listeners. Every method does nothing; a listener overrides those that it needs.

    Each method is called in the thread in which its event happens, maybe in several threads at once, and must not
    block. An exception is logged, and ends neither a run nor the heartbeats, except for CatfeederCronError from
    `beat(True)`: the heartbeat counts as failed then, and the next one calls `beat` again.
    """

    def began(self, run: Run, /) -> None:
        """Learn that a run has begun. It is called in the thread of the run."""

    def ended(self, run: Run, report: JobReport, /) -> None:
        """Learn that a run has ended, before it is recorded. No other run of the job begins before that."""

    def stuck(self, run: Run, /) -> None:
        """Learn that a run does not end though its time is up. It is called once for each run."""

    def retry(self, job_id: str, retry_in: timedelta, /) -> None:
        """Learn that a run that failed, in whatever process, is due again so soon. It may be called repeatedly."""

    def beat(self, reached: bool, /) -> None:
        """Learn that a heartbeat was due; `reached` says whether the database took it."""


class Listeners(RunListener):
    """Passes each event on to every listener. A listener may be added at any time, from any thread."""

    def __init__(self, *listeners: RunListener) -> None:
        # Replaced, never changed: another thread may be going through it at this moment.
        self._listeners = listeners

    def add(self, listener: RunListener) -> None:
        """Pass events on to this listener too, from now on."""
        self._listeners = (*self._listeners, listener)

    def began(self, run: Run, /) -> None:
        """Pass this on."""
        self._tell(lambda listener: listener.began(run))

    def ended(self, run: Run, report: JobReport, /) -> None:
        """Pass this on."""
        self._tell(lambda listener: listener.ended(run, report))

    def stuck(self, run: Run, /) -> None:
        """Pass this on."""
        self._tell(lambda listener: listener.stuck(run))

    def retry(self, job_id: str, retry_in: timedelta, /) -> None:
        """Pass this on."""
        self._tell(lambda listener: listener.retry(job_id, retry_in))

    def beat(self, reached: bool, /) -> None:
        """Pass this on. Raises CatfeederCronError of a listener if the heartbeat has reached the database."""
        self._tell(lambda listener: listener.beat(reached), pass_on=CatfeederCronError if reached else None)

    def _tell(self, event: Callable[[RunListener], None], *, pass_on: type[CatfeederCronError] | None = None) -> None:
        """Call `event` with each listener. Raises exceptions that are to end the program, and those to be passed on."""
        for listener in self._listeners:
            try:
                event(listener)
            except BaseException as error:
                if is_for_the_program(error) or (pass_on and isinstance(error, pass_on)):
                    raise
                log.exception("listener_failed", listener=type(listener).__name__)
