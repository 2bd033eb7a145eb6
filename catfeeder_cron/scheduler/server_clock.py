"""Tells the time by the database's clock, whatever this machine's clock shows, and says so when the two differ."""

from datetime import UTC, datetime, timedelta
from threading import Lock

from catfeeder_cron.logs import get_logger
from catfeeder_cron.scheduler.listeners import RunListener
from catfeeder_cron.times import elapsed_seconds

log = get_logger("catfeeder_cron.scheduler")

# What two machines that are kept in time by NTP differ by, and what a busy network adds, is no difference.
_SAME = timedelta(seconds=0.1)
_WORTH_TELLING = timedelta(seconds=3)
# A machine's clock that is set by more than this has been set, not slewed.
_A_STEP = timedelta(seconds=1)
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class ServerClock(RunListener):
    """The database's clock as of the last heartbeat, carried on by the clock that is never set.

    Before the first heartbeat it is this machine's clock. All methods may be called from any thread.
    """

    def __init__(self) -> None:
        # Seconds of the server's clock at the zero of `elapsed_seconds`. Replaced as a whole, so readers need no lock.
        self._offset: float | None = None
        self._told = False
        # Held by a thread that takes in a reading: of two heartbeats, one after the other.
        self._lock = Lock()

    @property
    def difference(self) -> timedelta:
        """How far this machine's clock is ahead of the database's; negative if it is behind."""
        return datetime.now(UTC) - self.now()

    @property
    def trouble(self) -> str:
        """Say that this machine's clock is wrong, or the database's; empty if they agree within 3 seconds."""
        ahead = self.difference
        if abs(ahead) < _WORTH_TELLING:
            return ""
        way = "ahead of" if ahead > timedelta(0) else "behind"
        return f"this machine's clock is {_rounded(ahead)} {way} the database's; jobs run by the database's"

    def now(self) -> datetime:
        """Return the time by the database's clock."""
        offset = self._offset
        if offset is None:
            return datetime.now(UTC)
        return _EPOCH + timedelta(seconds=offset + elapsed_seconds())

    def correction(self) -> timedelta:
        """Return what must be added to a time of this machine's clock to get the database's; zero if they agree."""
        ahead = self.difference
        return timedelta(0) if abs(ahead) < _SAME else -ahead

    def read(self, server_now: datetime, asked_at: float, answered_at: float) -> None:
        """Take in what the server's clock showed between two readings of `elapsed_seconds`.

        The clock moves no further than the reading proves: on a busy machine the answer may have waited.
        """
        seconds = (server_now - _EPOCH).total_seconds()
        least, most = seconds - answered_at, seconds - asked_at
        with self._lock:
            known = self._offset
            self._offset = (least + most) / 2 if known is None else min(max(known, least), most)

    def beat(self, reached: bool, /) -> None:
        """Log once that the clocks differ, and once that they agree again."""
        if not reached:
            return
        trouble = self.trouble
        with self._lock:
            before, self._told = self._told, bool(trouble)
        if trouble and not before:
            log.warning("clock_differs", seconds=round(self.difference.total_seconds(), 1), reason=trouble)
        elif before and not trouble:
            log.info("clock_agrees_again")


class ClockWatch:
    """Notices that this machine's clock was set, so that what waits by it has to be put off or brought forward."""

    def __init__(self, clock: ServerClock) -> None:
        self._clock = clock
        self._seen = clock.difference

    def was_set(self) -> bool:
        """Return whether the two clocks have moved against each other since the last call that returned True."""
        difference = self._clock.difference
        if abs(difference - self._seen) < _A_STEP:
            return False
        self._seen = difference
        return True


def _rounded(difference: timedelta) -> str:
    seconds = abs(difference)
    return (
        f"{seconds.total_seconds():.0f} s"
        if seconds < timedelta(minutes=2)
        else str(timedelta(seconds=round(seconds.total_seconds())))
    )
