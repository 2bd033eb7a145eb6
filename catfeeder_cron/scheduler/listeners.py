"""Who is told of the runs of this process: pings, wakers, the status, the metrics, in one list."""

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta

from catfeeder_cron.config import JobSettings
from catfeeder_cron.errors import CatfeederCronError
from catfeeder_cron.logs import get_logger
from catfeeder_cron.report import JobReport
from catfeeder_cron.run_control import RunControl, is_for_the_program

log = get_logger("catfeeder_cron.scheduler")


@dataclass(eq=False)
class Run:
    """A run of this process that the ledger knows, with the settings that it began with."""

    run_id: int
    job_id: str
    settings: JobSettings
    control: RunControl
    stuck_told_at: timedelta | None = field(default=None)


class RunListener:
    """Every method does nothing; a listener overrides those that it wants to know of.

    They are called in whatever thread it happens in, several at once maybe, and must not block. What they raise is
    logged and ends neither a run nor the heartbeats, but for CatfeederCronError from `beat`: that fails the heartbeat,
    and the next one comes again.
    """

    def began(self, run: Run, /) -> None:
        """A run has begun; it is in the thread that does the run."""

    def ended(self, run: Run, report: JobReport, /) -> None:
        """A run has ended, and is about to be recorded. No other run of the job begins before it is."""

    def stuck(self, run: Run, /) -> None:
        """A run does not end though its time is up. Told once for each."""

    def retry(self, job_id: str, retry_in: timedelta, /) -> None:
        """A run that failed, in whatever process, is to be made again so soon. Told several times maybe."""

    def beat(self, reached: bool, /) -> None:
        """A heartbeat was due; `reached` says whether the database took it."""


class Listeners:
    """All that are told. One may be added at any time, from any thread."""

    def __init__(self, *listeners: RunListener) -> None:
        # Replaced, never changed: another thread may be telling those that are in it.
        self._listeners = listeners

    def add(self, listener: RunListener) -> None:
        """Tell this one too, from now on."""
        self._listeners = (*self._listeners, listener)

    def tell(self, event: Callable[[RunListener], None], *, pass_on: type[CatfeederCronError] | None = None) -> None:
        """Call `event` with each of them; raise what is to end the program, and the errors to be passed on."""
        for listener in self._listeners:
            try:
                event(listener)
            except BaseException as error:
                if is_for_the_program(error) or (pass_on and isinstance(error, pass_on)):
                    raise
                log.exception("listener_failed", listener=type(listener).__name__)
