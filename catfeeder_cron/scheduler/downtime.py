"""Knows why slots passed without a run: since when this process is alive, and when the database was away."""

from dataclasses import dataclass, field
from datetime import datetime, timedelta
from threading import Lock

from catfeeder_cron.ledger.constants import DEAD_AFTER_SECONDS, NO_DAEMON, NO_DATABASE, NOT_FREE


@dataclass
class Downtime:
    """The outages of this process and of the database, by the process's wall clock.

    Every part that asks the database calls `seen` after an answer and `missed` after a failure. All methods may be
    called from any thread.
    """

    alive_since: datetime
    _last_seen: datetime | None = None
    _outage: tuple[datetime, datetime] | None = None
    _in_outage: bool = False
    _returns: int = 0
    # Held for a moment by the thread that has met or missed the database, or that asks.
    _lock: Lock = field(default_factory=Lock)

    @property
    def returns(self) -> int:
        """How often the database answered first, or again after an outage, a freeze or a clock put back."""
        with self._lock:
            return self._returns

    def seen(self, now: datetime) -> None:
        """Note that the database has answered."""
        with self._lock:
            last_seen, self._last_seen = self._last_seen, now
            if self._in_outage:
                self._in_outage = False
                self._outage = (last_seen or self.alive_since, now)
            elif last_seen is None or now - last_seen > timedelta(seconds=DEAD_AFTER_SECONDS):
                self.alive_since = now
            elif now > last_seen - timedelta(seconds=1):
                return
            self._returns += 1

    def missed(self) -> None:
        """Note that the database could not be reached."""
        with self._lock:
            self._in_outage = True

    def reasons(self, until: datetime) -> list[tuple[datetime, str]]:
        """Return why nothing ran, in order, each reason with the instant until which (inclusive) it holds."""
        with self._lock:
            outage = (self._last_seen or self.alive_since, until) if self._in_outage else self._outage
            return [
                (self.alive_since, NO_DAEMON),
                *([(outage[0], NOT_FREE), (outage[1], NO_DATABASE)] if outage else []),
                (until, NOT_FREE),
            ]
