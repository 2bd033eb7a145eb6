"""Why a slot went by: what this process knows of its own life and of the database's."""

from dataclasses import dataclass, field
from datetime import datetime, timedelta
from threading import Lock

from catfeeder_cron.ledger.constants import DEAD_AFTER_SECONDS, NO_DAEMON, NO_DATABASE, NOT_FREE


@dataclass
class Downtime:
    """Instants are the process's wall clock. `seen` and `missed` tell of every contact with the database that worked or
    did not. Safe to use from any thread.
    """

    alive_since: datetime
    _last_seen: datetime | None = None
    _outage: tuple[datetime, datetime] | None = None
    _in_outage: bool = False
    _returns: int = 0
    _lock: Lock = field(default_factory=Lock)

    @property
    def returns(self) -> int:
        """How often the database was met for the first time, or again after an outage, a freeze or a clock put back."""
        with self._lock:
            return self._returns

    def seen(self, now: datetime) -> None:
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
