"""Why a slot went by: what this process knows of its own life and of the database's."""

from dataclasses import dataclass, field
from datetime import datetime, timedelta
from threading import Lock

from catfeeder_cron.ledger import DEAD_AFTER_SECONDS, NO_DAEMON, NO_DATABASE, NO_WORKER


@dataclass
class Presence:
    """Instants are the process's wall clock. `seen` and `missed` tell of every contact with the database that worked or
    did not.
    """

    alive_since: datetime
    _last_seen: datetime | None = None
    _outage: tuple[datetime, datetime] | None = None
    _in_outage: bool = False
    _returned: bool = False
    _lock: Lock = field(default_factory=Lock)

    def seen(self, now: datetime) -> None:
        with self._lock:
            last_seen, self._last_seen = self._last_seen, now
            if self._in_outage:
                self._in_outage = False
                self._outage = (last_seen or self.alive_since, now)
                self._returned = True
            elif last_seen is None:
                self._returned = True
            elif now - last_seen > timedelta(seconds=DEAD_AFTER_SECONDS):
                self.alive_since = now
                self._returned = True

    def take_return(self) -> bool:
        """Return, once, that the first contact was made, or the first after an outage or a freeze of this process."""
        with self._lock:
            returned, self._returned = self._returned, False
            return returned

    def missed(self) -> None:
        with self._lock:
            self._in_outage = True

    def reason(self, slot: datetime) -> str:
        """Return why nothing ran at a slot that went by."""
        with self._lock:
            if self._outage and self._outage[0] < slot <= self._outage[1]:
                return NO_DATABASE
            return NO_DAEMON if slot <= self.alive_since else NO_WORKER

    def turning_points(self) -> list[datetime]:
        """Return the instants at which the reason changes, in order."""
        with self._lock:
            return sorted([self.alive_since, *(self._outage or ())])
