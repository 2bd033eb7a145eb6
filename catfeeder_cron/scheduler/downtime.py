"""Knows why slots passed without a run: since when this process is alive, and when the database was away or moved."""

from dataclasses import dataclass, field
from datetime import datetime, timedelta
from threading import Lock

from catfeeder_cron.ledger.constants import DEAD_AFTER_SECONDS, MOVED, NO_DAEMON, NO_DATABASE, NOT_FREE


@dataclass
class Downtime:
    """The outages of this process and of the database, by the database's clock.

    Every part that asks the database calls `seen` after an answer and `missed` after a failure. All methods may be
    called from any thread.
    """

    alive_since: datetime
    _last_seen: datetime | None = None
    _outage: tuple[datetime, datetime] | None = None
    _in_outage: bool = False
    _held: tuple[datetime, datetime] | None = None
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

    def held(self, after: datetime, until: datetime) -> None:
        """Note that no run could begin in (`after`, `until`], because the database had just moved."""
        with self._lock:
            before = self._held
            if before and after <= before[1]:
                after, until = min(after, before[0]), max(until, before[1])
            self._held = after, until

    def reasons(self, until: datetime) -> list[tuple[datetime, str]]:
        """Return why nothing ran, in order, each reason with the instant until which (inclusive) it holds."""
        with self._lock:
            outage = (self._last_seen or self.alive_since, until) if self._in_outage else self._outage
            held = self._held
            if held and outage and not self._in_outage and held[0] < outage[1]:
                held = outage[1], max(held[1], outage[1])
            return [
                (self.alive_since, NO_DAEMON),
                *([(outage[0], NOT_FREE), (outage[1], NO_DATABASE)] if outage else []),
                *([(held[0], NOT_FREE), (held[1], MOVED)] if held else []),
                (until, NOT_FREE),
            ]
